"""A file written tensor by tensor has the bytes that the safetensors library writes, and is read back."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.storage.atomic import drop_from_page_cache
from data_tools.storage.sha256 import sha256_of_file
from pipeline.checkpoint import tensor_stream
from pipeline.checkpoint.manifest import FileEntry
from pipeline.checkpoint.tensor_stream import StreamedTensor, in_memory, write_tensors
from pipeline.errors import CheckpointError


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_the_library(
    tmp_path: Path, dtype: torch.dtype, metadata: dict[str, str] | None
) -> None:
    tensors = {
        "wte.weight": torch.randn(5, 3, dtype=dtype),
        "h.0.c_fc.weight[2:9]": torch.randn(7, dtype=dtype),
        "exp_avg/ln_f.bias": torch.tensor([torch.nan if metadata else 1.0, -0.0], dtype=dtype),
    }
    save_file(tensors, tmp_path / "theirs", metadata)
    entry = write_tensors(tmp_path / "ours", {key: in_memory(tensor) for key, tensor in tensors.items()}, metadata)
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes()
    assert entry == FileEntry(len(content), hashlib.sha256(content).hexdigest(), not metadata)


def test_a_tensor_is_converted_and_need_not_be_contiguous(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)
    write_tensors(tmp_path / "file", {"x": StreamedTensor([6, 4], torch.bfloat16, tensor.t)})
    assert torch.equal(load_file(tmp_path / "file")["x"], tensor.t().bfloat16())


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs a read that only succeeds from the page cache")
def test_the_bytes_are_read_back_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_cached(path: Path) -> bool:
        with path.open("rb") as file, suppress(BlockingIOError):
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        return False

    def hash_file(path: Path) -> str:
        was_cached.append(is_cached(path))
        return sha256_of_file(path)

    was_cached: list[bool] = []
    monkeypatch.setattr(tensor_stream, "sha256_of_file", hash_file)
    write_tensors(tmp_path / "file", {"x": in_memory(torch.zeros(2))})
    assert is_cached(tmp_path / "file")
    drop_from_page_cache(tmp_path / "file")
    assert was_cached == [is_cached(tmp_path / "file")]  # [True] on a file system in memory, such as tmpfs


def test_other_bytes_on_the_disk_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_stream, "fsync_file", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"))
    with pytest.raises(CheckpointError, match=r"^file: was not written correctly$"):
        write_tensors(tmp_path / "file", {"x": in_memory(torch.zeros(2))})

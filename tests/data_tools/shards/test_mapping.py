"""Damaged shards are refused by name, and mapping needs neither reads nor file descriptors."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_tools.errors import DataError
from data_tools.shards.manifest import Manifest, ShardRecord
from data_tools.shards.mapping import npy_tokens
from data_tools.shards.reader import open_split
from data_tools.shards.verification import require_unchanged, verify
from data_tools.storage.atomic import write_json_durably
from tests.data_tools.conftest import environment
from tests.support.shard_folders import (
    END,
    edit_manifest,
    label,
    random_tokens,
    require_refused,
    write_folder,
)


class TestDamageOfEachFile:
    """A run refuses to start on a dataset with a damaged file, and names the file."""

    @pytest.fixture
    def folder(self, tmp_path: Path, format: str) -> Path:
        write_folder(tmp_path / "data", [random_tokens(20), random_tokens(30), random_tokens(3000)], format)
        return tmp_path / "data"

    @staticmethod
    def start_run(folder: Path) -> None:
        """Check a dataset as training does before its first step."""
        stream = open_split(folder, "train")
        for shard in stream.manifest.shards:
            require_unchanged(folder, shard)

    def expect_refused(self, path: Path, folder: Path) -> None:
        for check in (self.start_run, verify):
            with pytest.raises(DataError) as caught:
                check(folder)
            line = str(caught.value)
            assert str(folder) in line and path.name in line and "\n" not in line

    @pytest.mark.parametrize("index", range(4))
    def test_cut_anywhere(self, folder: Path, index: int) -> None:
        path = sorted(folder.iterdir())[index]
        content = path.read_bytes()
        for length in {0, 1, len(content) // 3, len(content) - 2 * (len(content) // 6), len(content) - 2}:
            path.write_bytes(content[:length])
            self.expect_refused(path, folder)

    @pytest.mark.parametrize("index", range(4))
    def test_grown(self, folder: Path, index: int) -> None:
        path = sorted(folder.iterdir())[index]
        path.write_bytes(path.read_bytes() + b"}")
        self.expect_refused(path, folder)

    @pytest.mark.parametrize("index", range(4))
    def test_deleted(self, folder: Path, index: int) -> None:
        path = sorted(folder.iterdir())[index]
        path.unlink()
        self.expect_refused(path, folder)

    @pytest.mark.parametrize("index", range(4))
    def test_a_folder_in_its_place(self, folder: Path, index: int) -> None:
        path = sorted(folder.iterdir())[index]
        path.unlink()
        path.mkdir()
        self.expect_refused(path, folder)

    def test_one_bit_of_a_shard(self, tmp_path: Path, format: str) -> None:
        """Flip every bit of the first 200 bytes, where the header is, and some of the others."""
        folder = tmp_path / "data"
        write_folder(folder, [random_tokens(20_000)], format)
        path = folder / f"train_000000.{format}"
        content = path.read_bytes()
        for at in [*range(200), *range(200, len(content), 977), *range(len(content) - 8, len(content))]:
            for bit in range(8) if at < 200 else (at % 8,):
                path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
                with pytest.raises(DataError) as caught:
                    self.start_run(folder)
                line = str(caught.value)
                assert str(path) in line and "\n" not in line, (at, bit)

    @pytest.mark.parametrize("index", range(1, 4))
    def test_another_shard_of_the_same_length(self, folder: Path, format: str, index: int) -> None:
        path = sorted(folder.iterdir())[index]
        other = folder.parent / "other"
        write_folder(other, [random_tokens(size, seed=1) for size in (20, 30, 3000)], format)
        path.write_bytes((other / path.name).read_bytes())
        open_split(folder, "train")
        self.expect_refused(path, folder)


def edit_shard(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = next(folder.glob("train_000001.*"))
        path.write_bytes(change(path.read_bytes()))

    return damage


def write_shard_of(tokens: np.ndarray) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        np.save(folder / "train_000001.npy", tokens)

    return damage


def write_arrow_of(table: pa.Table) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with pa.ipc.new_stream(str(folder / "train_000001.arrow"), table.schema) as stream:
            stream.write_table(table)

    return damage


SHARD_DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("npy", lambda folder: (folder / "train_000001.npy").unlink(), "train_000001.npy is missing"),
    ("arrow", lambda folder: (folder / "train_000001.arrow").unlink(), "train_000001.arrow is missing"),
    ("npy", edit_shard(lambda content: content[:-1]), "not a whole shard"),
    ("npy", edit_shard(lambda content: content[:-2]), "not a whole shard"),
    ("npy", edit_shard(lambda content: content + b"\0\0"), "bytes after its tokens"),
    ("npy", edit_shard(lambda content: content[:50]), "not a whole shard"),
    ("npy", edit_shard(lambda content: b""), "not a whole shard"),
    ("npy", edit_shard(lambda content: b"\0" * len(content)), "not a whole shard"),
    ("npy", write_shard_of(np.zeros(30, dtype=np.uint32)), r"its header says <u4 of shape \(30,\), expected <u2"),
    ("npy", write_shard_of(np.zeros((2, 15), dtype=np.uint16)), r"its header says <u2 of shape \(2, 15\), expected"),
    ("npy", write_shard_of(np.zeros(30, dtype=">u2")), "its header says >u2 of shape"),
    ("npy", write_shard_of(np.zeros(29, dtype=np.uint16)), "holds 29 tokens, manifest.json says 30"),
    ("arrow", edit_shard(lambda content: content[:-1]), "not a whole shard"),
    ("arrow", edit_shard(lambda content: content[:-8]), "does not end where its tokens end"),
    ("arrow", edit_shard(lambda content: content[:-40]), "not a whole shard"),
    ("arrow", edit_shard(lambda content: content + b"\0"), "does not end where its tokens end"),
    ("arrow", edit_shard(lambda content: b""), "not a whole shard"),
    ("arrow", edit_shard(lambda content: b"\0" * len(content)), "not a whole shard"),
    ("arrow", write_arrow_of(pa.table({"ids": pa.array([1], pa.uint16())})), "one column must be 'tokens'"),
    ("arrow", write_arrow_of(pa.table({"tokens": pa.array([1], pa.int64())})), "must be 'tokens' of uint16"),
    ("arrow", write_arrow_of(pa.table({"tokens": pa.array([None], pa.uint16())})), "not a whole shard"),
]


@pytest.mark.parametrize(("format", "damage", "message"), SHARD_DAMAGE, ids=label)
def test_a_damaged_shard_is_refused(tmp_path: Path, format: str, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "data"
    write_folder(folder, [random_tokens(20), random_tokens(30)], format)
    damage(folder)
    require_refused(folder, message)


def test_opening_does_not_read_the_tokens(tmp_path: Path) -> None:
    """A sparse shard of ten billion tokens opens at once, and a read touches only what it returns."""
    folder = tmp_path / "data"
    write_folder(folder, [random_tokens(20)])
    tokens = 10**10
    sparse = np.lib.format.open_memmap(folder / "train_000000.npy", mode="w+", dtype=np.uint16, shape=(tokens,))
    sparse[tokens - 3 :] = [5, 6, 7]
    del sparse
    edit_manifest(lambda manifest: manifest["shards"][0].update(tokens=tokens))(folder)
    assert open_split(folder, "train").read(tokens - 4, 4).tolist() == [0, 5, 6, 7]


def test_a_folder_whose_name_is_not_utf8_opens(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "caf\udce9"
    write_folder(folder, [random_tokens(20)], format)
    assert open_split(folder, "train").tokens == 20
    verify(folder)


MANY_SHARDS = """
import os, resource, sys
import numpy as np
from data_tools.shards.reader import open_split
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
stream = open_split(sys.argv[1], "train")
after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
print(int(stream.read(0, stream.tokens).astype(np.int64).sum()), after - before)
"""


def test_thousands_of_shards_need_no_file_descriptors(tmp_path: Path) -> None:
    """Map 1,500 shards in a process that may open 256 files."""
    folder = tmp_path / "data"
    folder.mkdir()
    shards = [np.array([END, index], dtype=np.uint16) for index in range(1500)]
    one = write_folder(folder, shards[:1])
    records = []
    for index, tokens in enumerate(shards):
        np.save(folder / f"train_{index:06d}.npy", tokens)
        records.append(ShardRecord(f"train_{index:06d}.npy", "train", 2, 1, 6, "0" * 64))
    manifest = Manifest(one.tokenizer, one.source, one.settings, tuple(records))
    write_json_durably(folder / "manifest.json", manifest.to_json())
    result = subprocess.run(
        [sys.executable, "-c", MANY_SHARDS, str(folder)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(sum(int(tokens.sum()) for tokens in shards)), "0"]


@pytest.fixture
def often_collected() -> Iterator[None]:
    """Other threads run during the garbage collections, which happen at almost every allocation."""
    thresholds = gc.get_threshold()

    def give_way(*_: object) -> None:
        time.sleep(1e-5)

    gc.callbacks.append(give_way)
    gc.set_threshold(1)
    yield
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(give_way)


@pytest.mark.usefixtures("often_collected")
def test_threads_can_map_arrays_at_the_same_time() -> None:
    """The threads have stacks of different depths, because CPython confused only those."""
    file = io.BytesIO()
    np.save(file, np.arange(9, dtype=np.uint16))
    content = pa.py_buffer(file.getvalue())

    def count(depth: int) -> int:
        return count(depth - 1) if depth else sum(npy_tokens(content).size for _ in range(100))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(count, range(8))) == [900] * 8

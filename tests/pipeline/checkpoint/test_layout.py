"""The names of checkpoint folders, and what a message says about a path without checkpoints."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import (
    checkpoint_of_step,
    is_checkpoint,
    list_checkpoints,
    no_checkpoint_error,
)
from pipeline.errors import CheckpointError
from tests.pipeline.checkpoint.conftest import MANIFEST


def test_a_failure_of_the_disk_is_not_an_empty_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror would set the checkpoints at the URL aside. From Python 3.14, Path.is_dir() hides such failures."""
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    assert list_checkpoints(tmp_path) == [folder]

    def fail(_: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(OSError, match="Stale"):
        list_checkpoints(tmp_path)


def test_a_path_that_cannot_exist_has_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    assert list_checkpoints(tmp_path) == list_checkpoints(tmp_path / "none") == list_checkpoints(Path("a\0b")) == []


class TestOtherPaths:
    """A path without checkpoints is described: what it is, and what to do."""

    @pytest.mark.parametrize(
        ("name", "files", "message"),
        [
            ("nowhere", None, "no checkpoint here; expected a run folder .*, and this path does not exist$"),
            ("empty", {}, "no checkpoint here; expected a run folder with checkpoints/, or a checkpoint folder"),
            ("docs", {"manifest.json": '{"shards": []}'}, "no checkpoint here, the folder holds token shards; "),
            ("hf", {"config.json": '{"model_type": "gpt2"}'}, r".* holds a Hugging Face model; .* --from-hf \S+ --out"),
            ("run", {"config.json": '{"run": {}}'}, "no checkpoint here; expected a run folder"),
        ],
    )
    def test_the_message_says_what_it_is(
        self, name: str, files: dict[str, str] | None, message: str, tmp_path: Path
    ) -> None:
        path = tmp_path / name
        if files is not None:
            path.mkdir()
        for file, content in (files or {}).items():
            (path / file).write_text(content)
        assert not is_checkpoint(path)
        with pytest.raises(CheckpointError) as refusal:
            checkpoint_of_step(path, 7)
        for error in (no_checkpoint_error(path), refusal.value):
            assert re.search(f"^{path}: {message}", str(error)), error

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "ckpt.pt").touch()
        message = str(no_checkpoint_error(tmp_path / "ckpt.pt"))
        assert "no checkpoint here, it is a file;" in message and "gpt2-pipeline checkpoint convert imports" in message

    def test_a_step_of_a_checkpoint(self, folder: Path) -> None:
        """A damaged manifest does not make the folder something else."""
        (folder / MANIFEST).write_text("{")
        with pytest.raises(CheckpointError, match="is the checkpoint of one step; give the run folder that holds it"):
            checkpoint_of_step(folder, 3)

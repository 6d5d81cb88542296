"""A checkpoint that cannot be written is an error of one line, and leaves everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import find_damage, newest_good_checkpoint, saving
from pipeline.errors import CheckpointError
from tests.pipeline.checkpoint.conftest import Save, unchanged
from tests.pipeline.conftest import largest_file


def files_of(run_folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size_bytes", [0, 100, 20_000])  # fails at once, in all files, and in the weights
def test_a_full_disk_leaves_the_old_checkpoint_alone(
    save: Save, backend: DdpBackend, tmp_path: Path, size_bytes: int
) -> None:
    older = save(1)
    before = files_of(tmp_path)
    with unchanged(backend), largest_file(size_bytes), pytest.raises(CheckpointError) as caught:
        save(2, keep_last=1)
    assert str(caught.value).startswith(f"cannot save {older.parent / 'step_00000002'}: rank 0: ")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]
    assert files_of(tmp_path) == before
    assert find_damage(older) is None
    assert newest_good_checkpoint(tmp_path) == older
    assert save(2, keep_last=1).name == "step_00000002"


def test_a_disk_with_room_for_the_weights_only(save: Save, tmp_path: Path) -> None:
    older = save(1)
    weights = (older / "rank_00000_weights.safetensors").stat().st_size
    with largest_file(weights), pytest.raises(CheckpointError, match=r"cannot save .*step_00000002: rank 0: "):
        save(2, keep_last=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_a_full_disk_for_the_last_file(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save(1)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_json_durably", no_space)
    with pytest.raises(CheckpointError, match=r"step_00000002: rank 0: No space left on device$"):
        save(2, keep_last=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_a_place_that_cannot_be_written_to(save: Save, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="cannot save"):
        save(1)


def test_a_name_that_is_taken_by_a_file(save: Save, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step_00000001.partial").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match=r"cannot save .*step_00000001: rank 0: "):
        save(1)
    assert save(2).name == "step_00000002"


def test_weights_that_are_not_finite_are_written_as_they_are(save: Save, backend: DdpBackend) -> None:
    """Reading back compares bits: NaN is not equal to itself."""
    with torch.no_grad():
        backend.model.wpe.weight[0, 0] = torch.nan
    assert find_damage(save(1)) is None

"""Deletion always leaves a checkpoint that verifies, and never an incomplete one under its name."""

from __future__ import annotations

import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import retention, tensor_stream
from pipeline.checkpoint.layout import checkpoint_folder, list_checkpoints, step_of
from pipeline.checkpoint.retention import (
    delete_checkpoint,
    delete_older,
    list_abandoned,
    list_leftovers,
    prune,
    remove_leftovers,
    set_aside_after,
)
from pipeline.checkpoint.state import ValidationHistory, read_state
from pipeline.checkpoint.verification import find_damage, newest_good_checkpoint
from pipeline.config.loading import dump_config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from tests.pipeline.checkpoint.conftest import MANIFEST, STATE, WEIGHTS, Save, state_of
from tests.pipeline.conftest import tiny_config
from tests.support.checkpoints import save_checkpoint
from tests.support.runs import run_ranks


def steps(run_folder: Path) -> list[int]:
    return [read_state(folder)[0].step for folder in list_checkpoints(run_folder)]


def names(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


class TestKeepLast:
    @pytest.mark.parametrize("keep_last", [1, 2, 3])
    def test_the_last_ones_are_kept(self, save: Save, tmp_path: Path, keep_last: int) -> None:
        for step in (5, 9, 10, 11, 100):
            save(step, keep_last)
        assert steps(tmp_path) == [5, 9, 10, 11, 100][-keep_last:]
        assert len(names(tmp_path)) == keep_last

    def test_they_are_ordered_by_step_not_by_name(self, save: Save, tmp_path: Path) -> None:
        for step in (99_999_999, 100_000_000, 100_000_001):
            save(step, keep_last=2)
        assert steps(tmp_path) == [100_000_000, 100_000_001]

    def test_a_run_that_went_back_keeps_its_new_checkpoints(self, save: Save, tmp_path: Path) -> None:
        for step in (5, 10, 15, 6, 7):
            save(step, keep_last=3)
        assert steps(tmp_path) == [5, 6, 7, 10, 15]
        save(8, keep_last=1)
        assert steps(tmp_path) == [8, 10, 15]

    def test_nothing_is_deleted_until_the_new_one_is_read_back(
        self, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The disk stores other bytes than were written."""
        older = save(1)

        def flip_a_bit(path: Path) -> None:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

        monkeypatch.setattr(tensor_stream, "fsync_file", flip_a_bit)
        with pytest.raises(CheckpointError, match=r"step_00000002: rank 0: rank_00000_weights.* not written corr"):
            save(2, keep_last=1)
        assert list((tmp_path / "checkpoints").iterdir()) == [older]
        assert newest_good_checkpoint(tmp_path) == older

    @pytest.mark.parametrize("keep_last", [1, 2])
    def test_a_good_one_is_always_kept(self, save: Save, tmp_path: Path, keep_last: int) -> None:
        """The older ones were damaged after they were written."""
        for step in (1, 2, 3, 4):
            for folder in list_checkpoints(tmp_path):
                (folder / WEIGHTS).write_bytes(b"")
            newest = save(step, keep_last)
            assert newest_good_checkpoint(tmp_path) == newest
        for _ in range(3):
            delete_older(tmp_path, newest, keep_last)
        assert newest_good_checkpoint(tmp_path) == newest

    def test_one_whose_manifest_cannot_be_read_does_not_stop_the_deletion(self, save: Save, tmp_path: Path) -> None:
        """It does not count. While it is among the newest ones, it is kept: a later version may have written it."""
        for step in (1, 2, 3):
            save(step)
        (checkpoint_folder(tmp_path, 3) / MANIFEST).write_text('{"format_version": 99}')
        save(4, keep_last=2)
        assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [2, 3, 4]
        save(5, keep_last=2)
        assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [4, 5]

    def test_a_failed_deletion_does_not_fail_the_save(
        self, save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        older = save(1)
        older.with_name(".step_00000001.deleted.partial").write_text("in the way")
        with caplog.at_level(logging.WARNING):
            newer = save(2, keep_last=1)
        assert "cannot delete older checkpoints" in caplog.text
        assert list_checkpoints(tmp_path) == [older, newer]
        assert find_damage(older) is None and find_damage(newer) is None


class TestDeletion:
    def test_an_incomplete_checkpoint_never_has_its_final_name(
        self, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        older, newer = save(1), save(2)

        def fail_half_way(folder: Path) -> None:
            (folder / STATE).unlink()
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(retention.shutil, "rmtree", fail_half_way)
        with pytest.raises(OSError, match="Input/output error"):
            delete_checkpoint(newer)
        monkeypatch.undo()
        assert list_checkpoints(tmp_path) == [older]
        assert list_leftovers(tmp_path) == [newer.with_name(".step_00000002.deleted.partial")]
        remove_leftovers(tmp_path)
        assert names(tmp_path) == [older.name]

    def test_a_process_killed_while_it_deletes_leaves_only_complete_checkpoints(
        self, save: Save, tmp_path: Path
    ) -> None:
        for step in (1, 2, 3):
            save(step)
        script = tmp_path / "delete.py"
        script.write_text(
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from pipeline.checkpoint import retention\n"
            "from pipeline.checkpoint.layout import list_checkpoints\n"
            "unlink, removed = os.unlink, []\n"
            "def die_after_two(*args, **options):\n"
            "    unlink(*args, **options); removed.append(args)\n"
            "    if len(removed) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
            "os.unlink = die_after_two\n"
            "run = Path(sys.argv[1]); retention.delete_older(run, list_checkpoints(run)[-1], 1)\n"
        )
        assert run_ranks(1, script, [str(tmp_path)], timeout_s=60).returncode == -signal.SIGKILL
        assert [len(list(folder.iterdir())) for folder in list_leftovers(tmp_path)] == [2]
        assert [(step_of(folder), find_damage(folder)) for folder in list_checkpoints(tmp_path)] == [
            (2, None),
            (3, None),
        ]

    def test_for_a_checkpoint_on_another_disk_only_the_link_is_deleted(self, save: Save, tmp_path: Path) -> None:
        linked, newer = save(1), save(2)
        elsewhere = linked.rename(tmp_path / "elsewhere")
        linked.symlink_to(elsewhere)
        delete_older(tmp_path, newer, 1)
        assert names(tmp_path) == [newer.name]
        assert find_damage(elsewhere) is None


class TestKeptForGood:
    """Milestones and the best checkpoint. What a checkpoint stores decides, not the config of the run that prunes."""

    @pytest.fixture
    def saved(self, tmp_path: Path, backend: DdpBackend, world: World) -> Path:
        """Return a run with checkpoints of steps 1 to 7: milestones at 3 and 6, the best one at 2."""
        config = dump_config(tiny_config())
        config["checkpoint"] |= {"keep_every_steps": 3, "keep_best": True}
        validation = ValidationHistory()
        for step, loss in enumerate([5.0, 4.0, 4.5, 4.2, 4.3, 4.4, 4.1], start=1):
            validation = validation.after(step, loss)
            state = replace(state_of(backend, step), validation=validation)
            save_checkpoint(tmp_path, state, config, backend, world, keep_last=1)
        return tmp_path

    def test_saving_keeps_them(self, saved: Path) -> None:
        assert steps(saved) == [2, 3, 6, 7]

    def test_pruning_keeps_them(self, saved: Path) -> None:
        assert [step_of(folder) for folder in prune(saved, 1, dry_run=False).kept] == [7, 6, 3, 2]
        assert steps(saved) == [2, 3, 6, 7]

    def test_a_better_one_takes_the_place_of_the_best(self, saved: Path, backend: DdpBackend, world: World) -> None:
        state, config = read_state(list_checkpoints(saved)[-1])
        better = replace(state, step=8, validation=state.validation.after(8, 3.0))
        save_checkpoint(saved, better, config, backend, world, keep_last=1)
        assert steps(saved) == [3, 6, 8]

    def test_a_run_without_these_settings_keeps_only_milestones(
        self, saved: Path, backend: DdpBackend, world: World
    ) -> None:
        state, config = read_state(list_checkpoints(saved)[-1])
        config["checkpoint"] |= {"keep_every_steps": None, "keep_best": False}
        save_checkpoint(saved, replace(state, step=8), config, backend, world, keep_last=1)
        assert steps(saved) == [3, 6, 8]

    def test_a_damaged_milestone_is_pruned(self, saved: Path) -> None:
        (list_checkpoints(saved)[1] / WEIGHTS).write_bytes(b"")
        assert [step_of(folder) for folder in prune(saved, 1, dry_run=True).kept] == [7, 6, 2]


class TestLeftovers:
    def test_leftovers_of_crashed_saves_are_removed(self, save: Save, tmp_path: Path) -> None:
        leftover = tmp_path / "checkpoints" / ".step_00000002.partial"
        leftover.mkdir(parents=True)
        (leftover / WEIGHTS).write_bytes(b"half")
        assert newest_good_checkpoint(tmp_path) is None
        folder = save()
        assert newest_good_checkpoint(tmp_path) == folder
        remove_leftovers(tmp_path)
        assert list((tmp_path / "checkpoints").iterdir()) == [folder]

    def test_a_leftover_of_the_same_step_is_replaced(self, save: Save, tmp_path: Path) -> None:
        leftover = tmp_path / "checkpoints" / ".step_00000003.partial"
        leftover.mkdir(parents=True)
        (leftover / "rank_00007_weights.safetensors").write_bytes(b"of more ranks")
        folder = save(3)
        assert find_damage(folder) is None
        assert list((tmp_path / "checkpoints").iterdir()) == [folder]
        assert len(list(folder.iterdir())) == 4

    def test_other_files_are_kept(self, save: Save, tmp_path: Path) -> None:
        folder = save()
        (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
        (tmp_path / "checkpoints" / "step_00000009.keep").mkdir()
        remove_leftovers(tmp_path)
        assert names(tmp_path) == ["notes.txt", folder.name, "step_00000009.keep"]
        assert list_checkpoints(tmp_path) == [folder]

    def test_a_run_without_checkpoints_has_none(self, tmp_path: Path) -> None:
        remove_leftovers(tmp_path)
        set_aside_after(tmp_path, 0)
        assert list(tmp_path.iterdir()) == []


class TestSettingAside:
    def test_later_ones_are_renamed_and_stay_good(
        self, save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        kept = [save(1), save(2)]
        later = [save(3), save(4)]
        with caplog.at_level(logging.WARNING):
            set_aside_after(tmp_path, 2)
        assert list_checkpoints(tmp_path) == kept
        assert newest_good_checkpoint(tmp_path) == kept[-1]
        abandoned = [folder.with_name(folder.name + ".abandoned") for folder in later]
        assert list_abandoned(tmp_path) == abandoned
        assert [find_damage(folder) for folder in abandoned] == [None, None]
        assert all(str(folder) in caplog.text for folder in abandoned)

    def test_they_are_not_counted_and_not_deleted(self, save: Save, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            save(step)
        set_aside_after(tmp_path, 1)
        save(2, keep_last=1)
        assert names(tmp_path) == ["step_00000002", "step_00000002.abandoned", "step_00000003.abandoned"]

    def test_one_set_aside_before_is_kept(self, save: Save, tmp_path: Path) -> None:
        for _ in range(2):
            save(1)
            set_aside_after(tmp_path, 0)
        assert names(tmp_path) == ["step_00000001.abandoned", "step_00000001.abandoned-2"]
        assert [find_damage(folder) for folder in list_abandoned(tmp_path)] == [None, None]

    def test_another_branch_of_the_same_step_is_set_aside(self, save: Save, tmp_path: Path) -> None:
        origin = save(2).rename(tmp_path / "checkpoints" / "step_00000002.abandoned")
        other = save(2)
        set_aside_after(tmp_path, 2, other)
        assert list_checkpoints(tmp_path) == [other]
        set_aside_after(tmp_path, 2, origin)
        assert list_checkpoints(tmp_path) == []
        assert names(tmp_path) == ["step_00000002.abandoned", "step_00000002.abandoned-2"]

    def test_one_set_aside_can_be_renamed_back(self, save: Save, tmp_path: Path) -> None:
        abandoned = save(2).with_name("step_00000002.abandoned")
        set_aside_after(tmp_path, 1)
        assert find_damage(abandoned) is None
        shutil.move(abandoned, tmp_path / "checkpoints" / "step_00000002")
        assert newest_good_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000002"

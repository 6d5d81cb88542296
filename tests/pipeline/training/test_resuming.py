"""A run starts where the user asks it to, and never continues a different run by mistake."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.errors import DataError
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint.layout import list_checkpoints, step_of
from pipeline.checkpoint.pairing import forget_abandoned, is_abandoned, pair
from pipeline.checkpoint.retention import delete_checkpoint
from pipeline.checkpoint.state import TrainingState, ValidationHistory
from pipeline.checkpoint.verification import find_damage
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.gpt2 import build_model
from pipeline.run_folder.lock import open_run_folder
from pipeline.training.resuming import (
    describe_changes,
    describe_raised_rate,
    describe_started_decay,
    find_start,
    load_checkpoint,
    prepare_run_folder,
    why_complete,
)
from pipeline.training.start import Start
from tests.pipeline.conftest import largest_file, tiny_config
from tests.support.checkpoints import save_checkpoint

DATA = "ab" * 32
MAX_STEPS = 100

Save = Callable[..., Path]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def config_of(run_folder: Path, resume: str | Path = "auto", **sections: dict[str, Any]) -> Config:
    defaults: dict[str, dict[str, Any]] = {
        "checkpoint": {"resume": str(resume)},
        "schedule": {"warmup_steps": 1, "max_steps": MAX_STEPS},
    }
    return tiny_config(run_folder, **{**defaults, **sections})


@pytest.fixture
def save(run_folder: Path, world: World) -> Save:
    """Save a checkpoint of a step, as a run started with ``resume`` does."""
    config = config_of(run_folder)
    backend = DdpBackend(build_model(config.model, 1), config, world)

    def save_step(
        step: int, resume: str | Path = "auto", *, folder: Path = run_folder, sha256: str | None = DATA
    ) -> Path:
        of_run = config_of(folder, resume)
        state = TrainingState(step, step * 4, step * 48, step, 1.0, 0, of_run.run.seed, sha256)
        return save_checkpoint(folder, state, dump_config(of_run), backend, world, keep_last=100)

    return save_step


def start(run_folder: Path, resume: str | Path = "auto", sha256: str = DATA, **sections: dict[str, Any]) -> Path | None:
    """Find the checkpoint from which a run starts. If the run is not complete, prepare its folder."""
    config = config_of(run_folder, resume, **sections)
    found = find_start(config, sha256)
    if found is None or why_complete(found, config) is None:
        run_folder.mkdir(exist_ok=True)
        prepare_run_folder(found, config)
    return found and found.folder


def damage(folder: Path) -> None:
    path = folder / "rank_00000_moments.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def names(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


def assert_refused(message: str, run_folder: Path, resume: str | Path = "auto", **options: Any) -> None:
    """Check that the start is refused in one line, and that no checkpoint is changed."""
    before = names(run_folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        start(run_folder, resume, **options)
    assert "\n" not in str(caught.value)
    assert names(run_folder) == before


class TestAuto:
    def test_a_new_run_starts_from_scratch(self, run_folder: Path) -> None:
        assert start(run_folder) is None
        (written,) = run_folder.iterdir()
        assert written.name == "config.json"
        assert Config.model_validate_json(written.read_text()) == config_of(run_folder)

    def test_a_run_continues_its_newest(self, save: Save, run_folder: Path) -> None:
        save(2)
        newest = save(4)
        assert start(run_folder) == newest
        assert names(run_folder) == ["step_00000002", "step_00000004"]

    def test_damaged_ones_are_skipped_and_set_aside(
        self, save: Save, run_folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        good = save(2)
        for step in (4, 6):
            damage(save(step))
        with caplog.at_level(logging.WARNING):
            assert start(run_folder) == good
        assert names(run_folder) == ["step_00000002", "step_00000004.abandoned", "step_00000006.abandoned"]
        assert "skipping a damaged checkpoint" in caplog.text

    def test_an_older_damaged_one_stays(self, save: Save, run_folder: Path) -> None:
        damage(save(2))
        newest = save(4)
        assert start(run_folder) == newest
        assert names(run_folder) == ["step_00000002", "step_00000004"]

    def test_all_damaged_is_refused(self, save: Save, run_folder: Path) -> None:
        """A start from scratch would delete the metrics of the run."""
        for step in (2, 4):
            damage(save(step))
        assert_refused(f"all its checkpoints are damaged.*or delete {run_folder}/checkpoints", run_folder)
        assert names(run_folder) == ["step_00000002", "step_00000004"]

    def test_a_finished_run_is_left_alone(self, save: Save, run_folder: Path) -> None:
        last = save(MAX_STEPS)
        damage(save(MAX_STEPS + 50))
        assert start(run_folder) == last
        assert names(run_folder) == ["step_00000100", "step_00000150"]


class TestNone:
    def test_a_fresh_folder_starts_from_scratch(self, run_folder: Path) -> None:
        assert start(run_folder, "none") is None

    @pytest.mark.parametrize("harm", [False, True], ids=["good", "damaged"])
    def test_a_used_folder_is_refused(self, save: Save, run_folder: Path, harm: bool) -> None:
        folder = save(2)
        if harm:
            damage(folder)
        assert_refused(f"{run_folder} already holds checkpoints of a run; .*--resume auto", run_folder, "none")

    def test_a_restart_by_the_launcher_continues(
        self, save: Save, run_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this launch")
        newest = [save(step, "none") for step in (2, 4)][-1]
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert start(run_folder, "none") == newest
        damage(newest)
        assert start(run_folder, "none") == newest.with_name("step_00000002")

    def test_a_restart_does_not_continue_an_older_launch(
        self, save: Save, run_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even if both have torchrun's default id."""
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_a/none_older/attempt_0/0/error.json")
        save(2, "none")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_b/none_newer/attempt_1/0/error.json")
        for restarts in ("0", "1", "2"):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
            assert_refused("already holds checkpoints", run_folder, "none")

    def test_the_launchers_first_start_is_none(
        self, save: Save, run_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(2)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        assert_refused("already holds checkpoints", run_folder, "none")

    def test_a_launcher_may_start_anew_before_the_first_checkpoint(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
        assert start(run_folder, "none") is None


@pytest.mark.parametrize("section", ["data", "model", "checkpoint"])
@pytest.mark.parametrize("content", [None, [1], "text"], ids=repr)
def test_a_stored_config_that_is_none_is_no_traceback(
    save: Save, world: World, run_folder: Path, section: str, content: Any
) -> None:
    good = config_of(run_folder)
    backend = DdpBackend(build_model(good.model, 1), good, world)
    state = TrainingState(2, 8, 96, 2, None, 0, good.run.seed, DATA)
    older = save_checkpoint(run_folder, state, {**dump_config(good), section: content}, backend, world, keep_last=2)
    try:
        assert start(run_folder, older) == older
    except CheckpointError as error:
        assert "\n" not in str(error)


class TestGoingBack:
    def test_later_ones_are_set_aside_and_auto_does_not_prefer_them(self, save: Save, run_folder: Path) -> None:
        older = [save(step) for step in (2, 4, 6)][0]
        assert start(run_folder, older) == older
        assert names(run_folder) == ["step_00000002", "step_00000004.abandoned", "step_00000006.abandoned"]
        assert start(run_folder) == older
        newer = save(3, older)
        assert start(run_folder) == newer
        assert names(run_folder)[-2:] == ["step_00000004.abandoned", "step_00000006.abandoned"]

    def test_the_later_ones_at_a_url_are_abandoned(self, save: Save, run_folder: Path) -> None:
        url = "s3://bucket/run"
        older, newer = [save(step) for step in (2, 4)]
        pair(run_folder, url)
        assert start(run_folder) == newer
        assert not is_abandoned(run_folder, url, 6), "the run has not gone back"
        assert start(run_folder, older) == older
        assert [is_abandoned(run_folder, url, step) for step in (2, 4)] == [False, True]
        forget_abandoned(run_folder, url)
        again = older.with_name("step_00000004.abandoned")
        assert start(run_folder, again) == again
        assert is_abandoned(run_folder, url, 4), "the URL may have this step of the other branch"

    def test_the_same_command_continues_what_it_has_written(self, save: Save, run_folder: Path) -> None:
        older = [save(step) for step in (2, 4)][0]
        assert start(run_folder, older) == older
        assert start(run_folder, older) == older, "it crashed before it had saved"
        newer = [save(step, older) for step in (3, 5)][-1]
        assert start(run_folder, older) == newer
        damage(newer)
        assert start(run_folder, older) == newer.with_name("step_00000003")

    def test_a_damaged_one_cannot_be_named(self, save: Save, run_folder: Path) -> None:
        older = save(2)
        save(4)
        damage(older)
        assert_refused("rank_00000_moments.safetensors: .*give another checkpoint", run_folder, older)

    def test_only_a_run_that_trains_sets_later_ones_aside(self, save: Save, run_folder: Path) -> None:
        """The metrics of a run that does not train keep the rows of the later steps, too."""
        url = "s3://bucket/run"
        older = [save(step) for step in (2, 4)][0]
        (older.parent / ".step_00000006.partial").mkdir()
        pair(run_folder, url)
        before = names(run_folder)
        config = config_of(run_folder, older)
        found = find_start(config, DATA)
        assert found == Start.read(older)
        assert names(run_folder) == before and not is_abandoned(run_folder, url, 4)
        prepare_run_folder(found, config)
        assert names(run_folder) == ["step_00000002", "step_00000004.abandoned"] and is_abandoned(run_folder, url, 4)

    def test_a_full_disk_sets_nothing_aside(self, save: Save, run_folder: Path) -> None:
        """Also if there is space for ``config.json``, but not for ``remote.json``."""
        older = [save(step) for step in (2, 4)][0]
        for number in range(200):
            pair(run_folder, f"s3://bucket/{number:050}")
        before, config = names(run_folder), config_of(run_folder, older)
        room = (run_folder / "remote.json").stat().st_size
        with largest_file(room), pytest.raises(CheckpointError, match="remote.json"):
            prepare_run_folder(find_start(config, DATA), config)
        assert (run_folder / "config.json").stat().st_size < room and names(run_folder) == before

    def test_one_set_aside_can_be_named(self, save: Save, run_folder: Path) -> None:
        older = [save(step) for step in (2, 4)][0]
        assert start(run_folder, older) == older
        abandoned = older.with_name("step_00000004.abandoned")
        assert start(run_folder, abandoned) == abandoned
        assert find_damage(abandoned) is None

    def test_one_set_aside_is_preferred_to_the_same_step_of_the_other_branch(
        self, save: Save, run_folder: Path
    ) -> None:
        older = [save(step) for step in (2, 4)][0]
        assert start(run_folder, older) == older
        save(4, older)
        abandoned = older.with_name("step_00000004.abandoned")
        assert start(run_folder, abandoned) == abandoned
        assert older.with_name("step_00000004") not in list_checkpoints(run_folder)
        assert find_damage(abandoned) is None, "the run continues from it"
        newer = save(5, abandoned)
        assert start(run_folder, abandoned) == start(run_folder) == newer

    def test_the_run_folder_itself_is_its_newest(self, save: Save, run_folder: Path) -> None:
        newest = [save(step) for step in (2, 4)][-1]
        assert start(run_folder, run_folder) == newest

    def test_a_step_after_the_end_sets_nothing_aside(self, save: Save, run_folder: Path) -> None:
        finished = save(MAX_STEPS)
        save(MAX_STEPS + 10)
        assert start(run_folder, finished) == finished
        assert names(run_folder) == ["step_00000100", "step_00000110"]


class TestAnotherRun:
    @pytest.fixture
    def other(self, save: Save, tmp_path: Path) -> Path:
        return [save(step, folder=tmp_path / "other") for step in (6, 8)][0]

    def test_a_new_run_starts_from_it_and_does_not_change_it(self, other: Path, run_folder: Path) -> None:
        assert start(run_folder, other) == other
        assert start(run_folder, other.parent.parent) == other.with_name("step_00000008")
        assert names(other.parent.parent) == ["step_00000006", "step_00000008"]

    def test_the_same_command_continues_what_it_has_written(self, save: Save, other: Path, run_folder: Path) -> None:
        assert start(run_folder, other) == other
        own = [save(step, f"{other}/") for step in (7, 9)][-1]
        assert start(run_folder, other) == own == start(run_folder, f"{other.parent}/./{other.name}")
        assert start(run_folder, "auto") == own
        assert names(run_folder) == ["step_00000007", "step_00000009"]

    def test_a_folder_that_holds_a_run_is_refused(self, save: Save, other: Path, run_folder: Path) -> None:
        save(2)
        assert_refused(f"{run_folder} already holds checkpoints of another run than {other};", run_folder, other)

    def test_a_branch_of_a_third_one_is_refused_too(
        self, save: Save, other: Path, run_folder: Path, tmp_path: Path
    ) -> None:
        save(7, other)
        third = save(3, folder=tmp_path / "third")
        assert_refused("already holds checkpoints of another run", run_folder, third)

    def test_it_must_leave_something_to_train(
        self, save: Save, other: Path, run_folder: Path, world: World, tmp_path: Path
    ) -> None:
        """The same command then continues what it has written, and is complete."""
        for max_steps in (6, 5):
            with pytest.raises(ConfigError, match=rf"{other}: at step 6 of schedule.max_steps {max_steps}, nothing to"):
                start(run_folder, other, schedule={"warmup_steps": 1, "max_steps": max_steps})
        assert not (run_folder / "checkpoints").exists()
        assert start(run_folder, other, schedule={"warmup_steps": 1, "max_steps": 7}) == other
        own = save(7, other)
        assert start(run_folder, other, schedule={"warmup_steps": 1, "max_steps": 7}) == own

    def test_a_stopped_evaluation_of_another_run_is_no_reason_to_start(
        self, world: World, run_folder: Path, tmp_path: Path
    ) -> None:
        config = config_of(tmp_path / "other")
        state = TrainingState(6, 24, 288, 6, 1.0, 0, 1337, DATA, evaluation_is_due=True)
        backend = DdpBackend(build_model(config.model, 1), config, world)
        other = save_checkpoint(tmp_path / "other", state, dump_config(config), backend, world, keep_last=1)
        with pytest.raises(ConfigError, match="at step 6 of schedule.max_steps 6, nothing to train"):
            start(run_folder, other, schedule={"warmup_steps": 1, "max_steps": 6})

    def test_one_that_has_stopped_early_is_not_continued_with_the_same_key(
        self, world: World, run_folder: Path, tmp_path: Path
    ) -> None:
        config = config_of(tmp_path / "other")
        state = TrainingState(6, 24, 288, 6, 1.0, 0, 1337, DATA, validation=ValidationHistory(2.5, 6))
        backend = DdpBackend(build_model(config.model, 1), config, world)
        other = save_checkpoint(tmp_path / "other", state, dump_config(config), backend, world, keep_last=1)
        with pytest.raises(ConfigError, match=r"at step 6, nothing to train: .*stop_at_val_loss.*; set this key"):
            start(run_folder, other, schedule={"warmup_steps": 1, "max_steps": 9, "stop_at_val_loss": 3.0})

    @pytest.mark.parametrize(
        ("schedule", "rates"),
        [
            # One of four steps of the decay is over, so the next one is the second.
            ({"name": "wsd", "max_steps": 9, "decay_steps": 4, "min_lr_ratio": 0}, ("5 to 9", "0.0005", 3)),
            ({"name": "linear", "max_steps": 11, "min_lr_ratio": 0}, ("1 to 11", "0.0005", 5)),
        ],
    )
    def test_a_start_inside_its_own_decay_gives_a_warning(
        self, other: Path, run_folder: Path, schedule: dict[str, Any], rates: tuple[str, str, int]
    ) -> None:
        sections = {"schedule": {"warmup_steps": 1, **schedule}, "optimizer": {"learning_rate": 1e-3}}
        steps, rate, decay_steps = rates
        branch = Start.read(other)
        assert describe_started_decay(branch, config_of(run_folder, **sections)) == (
            f"this branch begins at step 6, inside the decay of its schedule (steps {steps}): its learning rate begins "
            f"at {rate}, and the peak is 0.001; for a decay that begins at step 6, set schedule.name=wsd "
            f"schedule.decay_steps={decay_steps}"
        )
        advised = {**sections["schedule"], "name": "wsd", "decay_steps": decay_steps}
        assert describe_started_decay(branch, config_of(run_folder, **{**sections, "schedule": advised})) is None
        own = config_of(other.parent.parent, **sections)
        assert describe_started_decay(branch, own) is None, "not a branch"

    def test_a_schedule_that_is_lengthened_after_its_end_gives_a_warning(self, other: Path, run_folder: Path) -> None:
        ended, longer = ({"warmup_steps": 1, "max_steps": steps, "name": "linear"} for steps in (6, 11))
        start, own = Start.read(other), other.parent.parent
        start.state.config["schedule"] = dump_config(config_of(own, schedule=ended))["schedule"]
        warning = describe_raised_rate(start, config_of(own, schedule=longer, optimizer={"learning_rate": 1e-3}))
        assert warning is not None and "step 6" in warning and "from 0.0001 to 0.00055; " in warning
        assert describe_raised_rate(start, config_of(own, schedule=ended)) is None, "the same schedule"
        assert describe_raised_rate(start, config_of(run_folder, schedule=longer)) is None, "a branch"
        start.state.config["schedule"] = {**longer, "max_steps": 12}
        assert describe_raised_rate(start, config_of(own, schedule=longer)) is None, "the rate falls"

    def test_a_start_with_the_same_schedule_gives_no_warning(self, other: Path, run_folder: Path) -> None:
        assert describe_started_decay(Start.read(other), config_of(run_folder)) is None

    def test_a_path_without_a_checkpoint_is_refused(self, save: Save, run_folder: Path, tmp_path: Path) -> None:
        save(2)
        assert_refused("nowhere: no checkpoint here", run_folder, tmp_path / "nowhere")


class TestOrderOfTheData:
    @pytest.mark.parametrize("named", [False, True], ids=["auto", "path"])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"run": {"seed": 7}}, "run.seed 1337, now it is 7: .* set run.seed to 1337"),
            ({"data": {"seq_len": 6}}, "data.seq_len 12, now it is 6: .* set data.seq_len to 12"),
            ({"sha256": "cd" * 32}, "was trained on other data than .*set data.path"),
            (
                {"sha256": "cd" * 32, "data": {"mixture": [{"path": "a", "weight": 1}]}},
                "other data than data.mixture now has .* set data.mixture to the data it was trained on",
            ),
            (
                {"model": {"reset_positions_at": 88}},
                "reset_positions_at null, now it is 88: .*set model.reset_positions_at to null",
            ),
            (
                {"model": {"n_head": 1, "n_layer": 1}},
                r"its model has n_layer 2, n_head 3, and this run's model has n_layer 1, n_head 1; add --set "
                r"model.n_layer=2 model.n_head=3, or start a new run",
            ),
        ],
        ids=["seed", "sample length", "data", "mixture", "positions", "sizes"],
    )
    def test_a_changed_order_is_refused(
        self, save: Save, run_folder: Path, change: dict[str, Any], message: str, named: bool
    ) -> None:
        older = [save(step) for step in (2, 4)][0]
        assert_refused(message, run_folder, older if named else "auto", **change)

    def test_the_sample_length_may_be_given_by_another_key(self, save: Save, run_folder: Path) -> None:
        """12 is the model's context length."""
        newest = save(2)
        assert start(run_folder, data={"seq_len": 12}) == newest

    def test_everything_may_change_before_the_first_sample(self, save: Save, run_folder: Path) -> None:
        newest = save(0)
        assert start(run_folder, sha256="cd" * 32, run={"seed": 7}, data={"seq_len": 6}) == newest

    def test_a_checkpoint_without_a_data_hash_is_continued(self, save: Save, run_folder: Path) -> None:
        newest = save(2, sha256=None)
        assert start(run_folder) == newest

    def test_batch_backend_and_learning_rate_may_change(self, save: Save, run_folder: Path) -> None:
        newest = save(2)
        changes: dict[str, dict[str, Any]] = {
            "batch": {"tokens_per_step": 96},
            "backend": {"name": "fsdp"},
            "optimizer": {"learning_rate": 1e-5},
        }
        assert start(run_folder, **changes) == newest


class TestLeftovers:
    @pytest.mark.parametrize("resume", ["auto", "none"])
    def test_leftovers_of_crashed_saves_are_removed(self, run_folder: Path, resume: str) -> None:
        leftover = run_folder / "checkpoints" / ".step_00000003.partial"
        leftover.mkdir(parents=True)
        (leftover / "state.json").write_text("{")
        assert start(run_folder, resume) is None
        assert names(run_folder) == []

    def test_beside_good_checkpoints(self, save: Save, run_folder: Path) -> None:
        newest = save(2)
        (newest.parent / ".step_00000004.partial").mkdir()
        assert start(run_folder) == newest
        assert [step_of(folder) for folder in list_checkpoints(run_folder)] == [2]
        assert names(run_folder) == ["step_00000002"]

    def test_a_leftover_that_cannot_be_removed_is_a_one_line_error(self, save: Save, run_folder: Path) -> None:
        leftover = save(2).parent / ".step_00000004.partial"
        leftover.write_text("a file where a folder should be")
        assert_refused(f"{run_folder}: cannot be prepared .*{leftover.name}", run_folder)


class TestChanges:
    def test_each_changed_key_is_described(self, save: Save, run_folder: Path) -> None:
        changed = config_of(
            run_folder,
            optimizer={"learning_rate": 0.0001},
            backend={"name": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 2}}},
            evaluation={"tasks": ["validation", "lambada"]},
        )
        learning_rate = config_of(run_folder).optimizer.learning_rate
        assert describe_changes(Start.read(save(2)), changed) == [
            "backend.name ddp -> deepspeed",
            'evaluation.tasks ["validation"] -> ["validation", "lambada"]',
            f"optimizer.learning_rate {learning_rate} -> 0.0001",
        ]

    def test_a_resumed_run_without_changes(self, save: Save, run_folder: Path) -> None:
        folder = save(2)
        assert describe_changes(Start.read(folder), config_of(run_folder, resume=folder)) == []

    def test_the_state_is_read_once(self, save: Save, run_folder: Path) -> None:
        """Another process, such as the one that this run replaces, may delete the checkpoint meanwhile."""
        config = config_of(run_folder, resume=save(2))
        found = find_start(config, DATA)
        assert found is not None
        (found.folder / "state.json").unlink()
        prepare_run_folder(found, config)
        assert why_complete(found, config) is None and describe_started_decay(found, config) is None
        assert describe_changes(found, config) == [] and found.state.world_size == 1


def test_a_checkpoint_that_its_run_deletes_before_it_is_loaded_is_an_error_that_says_so(
    save: Save, run_folder: Path, world: World
) -> None:
    folder, config = save(2), config_of(run_folder)
    backend = DdpBackend(build_model(config.model, 1), config, world)
    delete_checkpoint(folder)
    with pytest.raises(CheckpointError, match="step_00000002 was deleted while it was read.*; repeat the command with"):
        load_checkpoint(folder, backend, world)


def test_a_rank_that_cannot_read_the_checkpoint_stops_all_ranks_before_the_next_collective(
    save: Save, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MainRank(World):
        def gather(self, item: Any) -> list[Any]:
            return [item, "rank 1 on b: step_00000002 cannot be read"]

        def broadcast(self, item: Any) -> Any:
            return item

    folder, config, main = save(2), config_of(run_folder), MainRank(0, 2, 0, torch.device("cpu"))
    backend = DdpBackend(build_model(config.model, 1), config, World.alone(main.device))
    monkeypatch.setattr(backend, "state_was_loaded", lambda _: pytest.fail("the other rank does not call this"))
    with pytest.raises(DataError, match="^rank 1 on b: step_00000002 cannot be read$"):
        load_checkpoint(folder, backend, main)


class TestRunFolder:
    @pytest.mark.parametrize("existing", ["", "runs"])
    def test_a_refused_start_leaves_no_folder(self, tmp_path: Path, existing: str) -> None:
        (tmp_path / existing).mkdir(exist_ok=True)
        config = config_of(tmp_path / "runs" / "new" / "run", resume=tmp_path / "none")
        with pytest.raises(CheckpointError, match="none"), open_run_folder(Path(config.run.out_dir)):
            find_start(config, DATA)
        assert [path.name for path in tmp_path.rglob("*")] == ([existing] if existing else [])

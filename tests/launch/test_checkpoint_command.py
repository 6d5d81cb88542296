"""``launch/checkpoint.py`` on real checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import launch.checkpoint
from data_tools.formatting import format_size
from pipeline.backends import create_backend
from pipeline.checkpoint import conversion
from pipeline.checkpoint.conversion import convert_checkpoint
from pipeline.checkpoint.inspection import inspect
from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.loading import load_training_state
from pipeline.checkpoint.retention import prune, set_aside_after
from pipeline.checkpoint.state import read_state, read_state_file
from pipeline.checkpoint.verification import find_damage
from pipeline.config.loading import config_from_json, load_config
from pipeline.config.schema import Config, RunConfig
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.world import World, join_world
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.run import run_tasks
from pipeline.interop.hugging_face.exporting import export_checkpoint
from pipeline.model.gpt2 import build_model
from pipeline.run_folder.lock import lock_run_folder
from pipeline.run_folder.metrics import read_metrics
from tests.pipeline.checkpoint.conftest import stored_tensors
from tests.support.checkpoints import save_checkpoint
from tests.support.commands import Done, command_runner
from tests.support.runs import TINY_RUN, TRAIN, merged, run_ranks, train_run

ONE_RANK = ["manifest.json", "rank_00000_moments.safetensors", "rank_00000_weights.safetensors", "state.json"]
LAST = "checkpoints/step_00000003"

PARTS = ("weights", "moments")

Command = Callable[..., Done]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_runner(launch.checkpoint, monkeypatch, capsys)


def succeeded(done: Done) -> str:
    status, output, errors = done
    assert status == 0 and not errors, output + errors
    return output


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with checkpoints of steps 1 to 3 from two ranks under FSDP. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    changes = {
        "data": {"path": str(corpus)},
        "schedule": {"max_steps": 3, "warmup_steps": 1},
        "checkpoint": {"every_steps": 1, "keep_last": 3},
    }
    result = train_run("fsdp", folder, merged(TINY_RUN, changes), processes=2)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def names(run_folder: Path) -> list[str]:
    return sorted(folder.name for folder in (run_folder / "checkpoints").iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add_leftovers(run_folder: Path) -> None:
    """Add what a crashed save and a run that went back leave behind."""
    leftover = run_folder / "checkpoints" / ".step_00000004.partial"
    leftover.mkdir()
    (leftover / "rank_00000_weights.safetensors").write_bytes(bytes(5000))
    set_aside_after(run_folder, 2)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class TestInspect:
    def test_a_checkpoint(self, trained: Path, command: Command) -> None:
        before = hashes(trained)
        lines = succeeded(command("inspect", trained / LAST)).splitlines()
        rows = {line[2:13].strip(): line[13:] for line in lines[1:]}
        assert lines[0] == str(trained / LAST)
        assert (rows["step"], rows["updates"], rows["samples"], rows["tokens"]) == ("3", "3", "24", "1,152")
        assert rows["loss scale"] == "none"
        assert rows["precision"] == "fp32"
        assert rows["written by"] == "fsdp, world size 2"
        assert rows["model"].startswith("2,") and "n_embd 51" in rows["model"], "not gpt2-tiny"
        assert f"torch {torch.__version__}" in rows["versions"]
        for rank in (0, 1):
            sizes = [(trained / LAST / f"rank_0000{rank}_{part}.safetensors").stat().st_size for part in PARTS]
            weights, moments = map(format_size, sizes)
            assert rows[f"rank {rank}"] == f"weights {weights}, moments {moments}"
        assert rows["files"] == "all there, of the right sizes"
        assert hashes(trained) == before

    def test_a_run(self, run_folder: Path, command: Command) -> None:
        add_leftovers(run_folder)
        os.truncate(run_folder / "checkpoints/step_00000001/rank_00001_weights.safetensors", 9)
        (run_folder / "checkpoints/step_00000002/manifest.json").write_text("{")
        before = hashes(run_folder)
        head, _, first, second, leftover, abandoned = succeeded(command("inspect", run_folder)).splitlines()
        assert head.startswith(f"{run_folder}: checkpoints 2, ")
        assert first.split()[0] == "step_00000001" and " 2  fsdp " in first
        assert "rank_00001_weights.safetensors: 9 bytes, expected" in first
        assert second.split()[0] == "step_00000002" and "manifest.json: cannot be read" in second
        assert ".step_00000004.partial" in leftover and "5.0 kB  left by an interrupted save" in leftover
        assert "step_00000003.abandoned" in abandoned and "set aside when the run went back" in abandoned
        assert hashes(run_folder) == before

    def test_what_went_wrong_in_the_run(self, run_folder: Path) -> None:
        path = run_folder / LAST / "state.json"
        guard = {"rollbacks": 1, "skipped_samples": [[8, 16]]}
        path.write_text(json.dumps({**json.loads(path.read_text()), "updates": 2, "loss_scale": 512.0, "guard": guard}))
        text = str(inspect(run_folder / LAST))
        for line in (
            "  step       3, 1 of them without an update",
            "  loss scale 512",
            "  rollbacks  1, samples left out: 8 to 15",
            f"  files      {path}: {path.stat().st_size} bytes, expected ",
        ):
            assert line in text

    def test_as_json(self, trained: Path, command: Command) -> None:
        one = command("inspect", "--json", trained / LAST)
        run = command("inspect", trained, "--json")
        report = json.loads(succeeded(one))
        assert json.loads(succeeded(run))["checkpoints"][-1] == report
        contents = report["contents"]
        assert (contents["step"], contents["world_size"], contents["backend"]) == (3, 2, "fsdp")
        assert report["problem"] is None
        spaces = sum(space["weights"] + space["moments"] for space in contents["ranks"])
        assert spaces + contents["state_bytes"] == report["bytes"]
        assert report["bytes"] == sum(path.stat().st_size for path in (trained / LAST).iterdir())


class TestVerify:
    def test_good_and_damaged(self, run_folder: Path, command: Command) -> None:
        second = run_folder / "checkpoints/step_00000002"
        flip_a_bit(second / "rank_00001_moments.safetensors")
        one = command("verify", run_folder / LAST)
        status, output, errors = command("verify", run_folder)
        first, summary = succeeded(one).splitlines()
        assert first == f"ok       {run_folder / LAST}" and summary.endswith(" MB/s")
        assert status == 2
        lines = output.splitlines()
        assert lines[0] == f"ok       {run_folder}/checkpoints/step_00000001"
        assert lines[1].startswith(f"damaged  {second}/rank_00001_moments.safetensors: contents changed")
        assert lines[2].startswith("ok")
        assert lines[3].startswith("read ")
        (line,) = errors.splitlines()
        assert line.startswith(f"error: {run_folder}: damaged checkpoints: 1 of 3; ")


class TestPrune:
    def test_the_newest_good_one_is_kept(self, run_folder: Path, command: Command) -> None:
        add_leftovers(run_folder)
        before, size_before = hashes(run_folder), size_of(run_folder)
        dry = succeeded(command("prune", run_folder, "--dry-run"))
        assert hashes(run_folder) == before
        real = succeeded(command("prune", run_folder))
        assert names(run_folder) == ["step_00000002"]
        assert find_damage(run_folder / "checkpoints/step_00000002") is None
        listed, (last,) = real.splitlines()[:-1], real.splitlines()[-1:]
        assert [line[:34].split() for line in listed] == [
            ["keep", "step_00000002"],
            ["delete", ".step_00000004.partial"],
            ["delete", "step_00000003.abandoned"],
            ["delete", "step_00000001"],
        ]
        freed = format_size(size_before - size_of(run_folder))
        assert last == f"freed {freed}"
        assert dry.splitlines() == [*listed, f"would free {freed}; nothing was deleted"]

    def test_damaged_ones_are_deleted_and_do_not_count(self, run_folder: Path) -> None:
        flip_a_bit(run_folder / LAST / "rank_00000_weights.safetensors")
        pruned = prune(run_folder, keep=1, dry_run=False)
        assert names(run_folder) == ["step_00000002"]
        assert "delete  step_00000003" in str(pruned) and "damaged: " in str(pruned)
        prune(run_folder, keep=1, dry_run=False)
        assert names(run_folder) == ["step_00000002"]

    @pytest.mark.parametrize("keep", [2, 3, 9])
    def test_the_requested_number_is_kept(self, run_folder: Path, keep: int) -> None:
        prune(run_folder, keep, dry_run=False)
        assert names(run_folder) == ["step_00000001", "step_00000002", "step_00000003"][-keep:]

    def test_without_a_good_one_nothing_is_deleted(self, run_folder: Path) -> None:
        add_leftovers(run_folder)
        for folder in list_checkpoints(run_folder):
            flip_a_bit(folder / "state.json")
        before = hashes(run_folder)
        with pytest.raises(CheckpointError, match="none of its checkpoints verifies, so nothing was deleted"):
            prune(run_folder, keep=1, dry_run=False)
        assert hashes(run_folder) == before

    def test_what_another_version_wrote_is_not_damaged(self, run_folder: Path) -> None:
        path = run_folder / LAST / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 3}))
        before = hashes(run_folder)
        with pytest.raises(CheckpointError, match="format version 3, this program knows 1 and 2"):
            prune(run_folder, keep=1, dry_run=False)
        assert hashes(run_folder) == before

    def test_not_while_a_run_holds_the_folder(self, run_folder: Path) -> None:
        with lock_run_folder(run_folder), pytest.raises(ConfigError, match="in use by another run"):
            prune(run_folder, keep=1, dry_run=False)
        assert len(list_checkpoints(run_folder)) == 3


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class TestConvert:
    def test_one_rank_holds_what_two_held_and_trains_on(self, trained: Path, tmp_path: Path, command: Command) -> None:
        out = tmp_path / "out"
        assert "step_00000003 in " in succeeded(command("convert", trained, "--out", out))
        folder = out / LAST
        assert sorted(path.name for path in folder.iterdir()) == ONE_RANK
        assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "config.json"]
        assert find_damage(folder) is None

        original, converted = stored_tensors(trained / LAST), stored_tensors(folder)
        assert original.keys() == converted.keys()
        for name, tensor in original.items():
            assert torch.equal(converted[name], tensor), name
        with safe_open(folder / ONE_RANK[2], framework="pt") as file:
            manifest = json.loads((folder / "manifest.json").read_text())
            assert {key: file.get_slice(key).get_shape() for key in file.keys()} == manifest["parameters"]  # noqa: SIM118
        assert read_state(folder) == read_state(trained / LAST)
        assert load_config([out / "config.json"]).run.out_dir == str(out)

        more = ["--config", str(out / "config.json"), "--resume", str(out), "--set", "schedule.max_steps=4"]
        result = run_ranks(1, TRAIN, more)
        assert result.returncode == 0, result.stderr
        assert f"continues {folder}" in result.stdout
        assert [row["step"] for row in read_metrics(out) if "loss" in row] == [4]

    def test_the_bytes_are_those_that_one_rank_saves(self, trained: Path, tmp_path: Path) -> None:
        convert_checkpoint(trained / LAST, tmp_path / "out")
        config = config_from_json(read_state(trained / LAST)[1], "state.json")
        config = config.model_copy(update={"backend": Config().backend})
        folder = tmp_path / "out" / LAST
        with alone() as world:
            backend = create_backend(build_model(config.model, 7), config, world, plan_batch(config, 1))
            state = load_training_state(folder, backend)
            saved = save_checkpoint(tmp_path / "saved", state, read_state(folder)[1], backend, world, 1)
        assert hashes(saved) == hashes(folder)

    def test_not_while_a_run_holds_the_folder(self, trained: Path, tmp_path: Path) -> None:
        with lock_run_folder(tmp_path), pytest.raises(ConfigError, match="in use by another run"):
            convert_checkpoint(trained, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_source_that_changes_meanwhile_leaves_nothing(
        self, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def vanished(*_: object) -> None:
            raise CheckpointError("rank_00001_weights.safetensors: cannot be read (no such file)")

        monkeypatch.setattr(conversion, "read_parameter", vanished)
        with pytest.raises(CheckpointError, match=r"cannot save .*step_00000003: rank 0: rank_00001.*cannot be read"):
            convert_checkpoint(trained, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        monkeypatch.undo()
        convert_checkpoint(trained, tmp_path / "out")
        assert find_damage(tmp_path / "out" / LAST) is None


class TestAverage:
    def test_the_new_run_is_evaluated_exported_and_trained_further(
        self, trained: Path, tmp_path: Path, command: Command
    ) -> None:
        """Two ranks under FSDP have written the checkpoints."""
        out = tmp_path / "out"
        arguments = ("average", trained, "--steps", "1", "2", "3", "--out", out)
        assert f"saved {out / LAST} in " in succeeded(command(*arguments))
        inspected = succeeded(command("inspect", out / LAST))
        assert "  weights    mean of steps 1, 2, 3\n" in inspected
        export_checkpoint(out, tmp_path / "exported", "float32")
        assert (tmp_path / "exported" / "model.safetensors").is_file()
        with alone() as world:
            results, _ = run_tasks(out, ["validation"], Settings(), world)
        assert results["validation"]["step"] == 3

        more = ["--config", str(out / "config.json"), "--set", "schedule.max_steps=4"]
        result = run_ranks(1, TRAIN, more)
        assert result.returncode == 0, result.stderr
        assert f"continues {out / LAST}" in result.stdout
        assert [row["step"] for row in read_metrics(out) if "loss" in row] == [4]
        assert read_state_file(out / "checkpoints/step_00000004").averaged_steps == ()


@contextmanager
def alone() -> Iterator[World]:
    """Yield this process as a world of one, and restore the environment afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("DS_ACCELERATOR", "cpu")):
            patch.setenv(name, value)
        with join_world(RunConfig(device="cpu")) as world:
            yield world


def test_a_mistake_is_one_line(run_folder: Path, tmp_path: Path, command: Command) -> None:
    nowhere, used = tmp_path / "nowhere", tmp_path / "used"
    shutil.copytree(run_folder, used)
    flip_a_bit(run_folder / LAST / "state.json")
    (tmp_path / "file").write_text("no checkpoint")
    mistakes: list[tuple[tuple[object, ...], str]] = [
        ((), "required: inspect|verify|prune|convert|average (see checkpoint.py --help)"),
        (("look", nowhere), "invalid choice: 'look' (choose from"),
        (("inspect",), "required: DIR (see checkpoint.py inspect --help)"),
        (("prune", used, "--keep", "0"), "--keep: must be a whole number from 1, it is '0'"),
        (("convert", used), "required: --out (see checkpoint.py convert --help)"),
        (("inspect", nowhere), f"{nowhere}: no checkpoint here; expected a run folder"),
        (("verify", nowhere), f"{nowhere}: no checkpoint here; expected a run folder"),
        (("prune", nowhere), f"{nowhere}: no checkpoint here; expected a run folder"),
        (("prune", used / LAST), "is a checkpoint; give the run folder"),
        (("convert", nowhere, "--out", tmp_path / "a"), f"{nowhere}: no checkpoint here"),
        (("convert", run_folder / LAST, "--out", tmp_path / "a"), "state.json: contents changed"),
        (("convert", run_folder, "--out", used), "already has checkpoints (step_00000003); name another"),
        (("convert", used, "--out", tmp_path / "file"), "file is not a run folder; name a folder"),
        (("convert", used, "--out", tmp_path / "file" / "out"), "cannot write"),
        (("convert", nowhere, "--out", tmp_path / "file" / "out"), "cannot write"),  # before it reads the source
        (("average", used, "--out", tmp_path / "a"), "one of the arguments --last --steps is required"),
        (("average", used, "--last", "4", "--out", tmp_path / "a"), "has fewer than 4 checkpoints"),
        (("average", run_folder, "--last", "2", "--out", tmp_path / "a"), "state.json: contents changed"),
        (("average", used, "--last", "2", "--out", used), "already has checkpoints (step_00000003); name another"),
        (
            ("convert", tmp_path / "file", "--out", tmp_path / "a"),
            "file: is damaged, or not a file of torch.save; expected ",
        ),
    ]
    for arguments, expected in mistakes:
        status, _, errors = command(*arguments)
        assert status == 2 and len(errors.splitlines()) == 1, errors
        assert errors.startswith("error: ") and expected in errors, errors
    assert not (tmp_path / "a").exists()


def test_each_sub_command_has_help_with_an_example(command: Command) -> None:
    for name in ("inspect", "verify", "prune", "convert", "average"):
        done = command(name, "--help")
        assert f"example:\n  gpt2-pipeline checkpoint {name} " in succeeded(done)

"""A run continues where it stopped, on any backend and world size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import checkpoint_of_step, list_checkpoints
from pipeline.run_folder.metrics import read_metrics
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.averages import largest_average_difference
from tests.support.runs import TINY_BYTE_RUN, Sections, curve_of, merged, read_curve, train_run

STEPS, SAVED_AT = 8, 4


def run_sections(byte_corpus: Path, *layers: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    base = {
        "data": {"path": str(byte_corpus)},
        "schedule": {"max_steps": STEPS, "warmup_steps": 2},
        "checkpoint": {"every_steps": SAVED_AT, "keep_last": 5},
        "evaluation": {"every_steps": 2},
        "logging": {"sinks": ["jsonl", "tensorboard", "console"]},
    }
    return merged(TINY_BYTE_RUN, base, *layers)


def forget_after(run_folder: Path, step: int) -> None:
    """Delete later checkpoints, as if the run had crashed right before it wrote them."""
    for folder in list_checkpoints(run_folder):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def steps_logged(run_folder: Path) -> list[tuple[int, bool]]:
    """Return the steps of training and validation rows. Rows of saves come when the save ends, a step or two later."""
    return [(row["step"], "loss" in row) for row in read_metrics(run_folder) if "loss" in row or "val_loss" in row]


def weights_of(run_folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in list_checkpoints(run_folder)[-1].glob("*.safetensors")}


class Wholes:
    """Folders of uninterrupted runs with dropout and an average of the weights, each trained at its first use."""

    def __init__(self, byte_corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = byte_corpus, folder

    def __call__(self, backend: str, processes: int, precision: str, optimizer: str) -> Path:
        folder = self.folder / f"{backend}x{processes}-{precision}-{optimizer}"
        if not folder.exists():
            curve_of(backend, folder, self.sections(precision, optimizer), processes)
        return folder

    def sections(self, precision: str, optimizer: str) -> Sections:
        changes = {"run": {"precision": precision}, "model": {"dropout": 0.1}, "optimizer": {"name": optimizer}}
        return run_sections(self.corpus, changes, {"averaging": {"ema": 0.9}})


@pytest.fixture(scope="module")
def wholes(byte_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    return Wholes(byte_corpus, tmp_path_factory.mktemp("wholes"))


@pytest.mark.parametrize(
    ("backend", "processes", "precision", "optimizer"),
    [
        ("ddp", 1, "fp32", "adamw"),
        ("fsdp", 2, "amp_bf16", "adamw"),
        ("zero1", 2, "bf16", "adamw"),
        ("zero2", 1, "amp_fp16", "adamw"),
        ("zero3", 2, "fp32", "adamw"),
        ("ddp", 2, "bf16", "muon"),
        ("fsdp", 2, "fp32", "muon"),
        ("zero1", 2, "amp_fp16", "muon"),
        ("zero3", 2, "fp32", "muon"),
        ("zero2_offload", 1, "fp32", "adamw"),
        ("zero3_offload", 2, "amp_bf16", "muon"),
    ],
)
def test_the_same_run_continues_bit_for_bit(
    backend: str, processes: int, precision: str, optimizer: str, wholes: Wholes, tmp_path: Path
) -> None:
    """Losses, weights, their average and optimizer state equal those of the uninterrupted run; dropout is active."""
    whole = wholes(backend, processes, precision, optimizer)
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    forget_after(folder, SAVED_AT)
    assert curve_of(backend, folder, wholes.sections(precision, optimizer), processes) == read_curve(whole)
    assert weights_of(folder) == weights_of(whole)
    assert steps_logged(folder) == steps_logged(whole), "a gap or a duplicate"


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        (("ddp", 1), ("zero3", 2), "adamw"),
        (("zero3", 2), ("fsdp", 1), "adamw"),
        (("zero3", 2), ("ddp", 1), "muon"),
        (("ddp", 1), ("fsdp", 2), "muon"),
        (("fsdp", 2), ("zero2_offload", 1), "muon"),
        (("zero1", 1), ("zero3", 2), "muon"),
    ],
    ids=lambda side: side if isinstance(side, str) else f"{side[0]}x{side[1]}",
)
def test_another_backend_and_world_size_continue_the_curve_and_the_average(
    before: tuple[str, int], after: tuple[str, int], optimizer: str, wholes: Wholes, tmp_path: Path
) -> None:
    """``test_more_ranks`` has the other backends."""
    saved = checkpoint_of_step(wholes(*before, "fp32", optimizer), SAVED_AT)
    sections = merged(wholes.sections("fp32", optimizer), {"checkpoint": {"resume": str(saved)}})
    continued = curve_of(after[0], tmp_path, sections, after[1])
    expected = wholes("ddp", 1, "fp32", optimizer)
    assert len(continued.losses) == STEPS - SAVED_AT
    assert continued.largest_loss_difference(read_curve(expected).after(SAVED_AT)) <= LOSS_TOLERANCE["fp32"]
    assert largest_average_difference(tmp_path, expected) <= LOSS_TOLERANCE["fp32"]


def test_a_branch_equals_the_uninterrupted_run_with_its_schedule(byte_corpus: Path, tmp_path: Path) -> None:
    """A stable run under DDP serves a shorter budget: a branch under ZeRO-3 at another world size adds the decay."""
    wsd = {"name": "wsd", "decay_steps": 3, "decay_shape": "1-sqrt", "min_lr_ratio": 0.0}
    stable = run_sections(
        byte_corpus, {"schedule": wsd, "checkpoint": {"every_steps": 100, "keep_every_steps": SAVED_AT, "keep_last": 1}}
    )
    decayed = run_sections(byte_corpus, {"schedule": {**wsd, "max_steps": SAVED_AT + 3}})
    expected = curve_of("ddp", tmp_path / "expected", decayed)
    curve_of("ddp", tmp_path / "stable", stable)
    milestone = checkpoint_of_step(tmp_path / "stable", SAVED_AT)

    branch = merged(decayed, {"checkpoint": {"resume": str(milestone)}})
    losses = curve_of("zero3", tmp_path / "branch", branch, 2).losses
    differences = [abs(a - b) for a, b in zip(losses, expected.losses[SAVED_AT:], strict=True)]
    assert max(differences) <= LOSS_TOLERANCE["fp32"]
    assert weights_of(tmp_path / "stable"), "the stable run was not changed"


def test_another_optimizer_continues_with_the_weights(byte_corpus: Path, tmp_path: Path) -> None:
    curve_of("fsdp", tmp_path, run_sections(byte_corpus, {"schedule": {"max_steps": SAVED_AT}}), processes=2)
    changed = run_sections(byte_corpus, {"optimizer": {"name": "muon"}})
    result = train_run("zero1", tmp_path, changed, processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "changed   optimizer.name adamw -> muon" in result.stdout
    assert result.stdout.count("another optimizer has written this checkpoint; the optimizer's state starts") == 1
    losses = read_curve(tmp_path).losses
    assert len(losses) == STEPS and losses[-1] < losses[SAVED_AT] + 0.1 < losses[0]


def test_a_finished_run_is_not_changed(byte_corpus: Path, tmp_path: Path) -> None:
    sections = run_sections(byte_corpus)
    curve_of("ddp", tmp_path, sections)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    result = train_run("ddp", tmp_path, sections)
    assert result.returncode == 0
    assert "nothing to train" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before

"""Test that real runs of every backend give the same curve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.accumulation import compare as compare_accumulation
from benchmarks.parity import PROCESSES
from pipeline.run_folder.metrics import LAYER_PREFIX, read_metrics
from tests.support.agreement import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE
from tests.support.averages import largest_average_difference
from tests.support.runs import BACKENDS, TINY_BYTE_RUN, Curve, copy_with_masks, curve_of, merged, read_curve

STEPS = 10


def tiny_run(byte_corpus: Path, **sections: dict[str, object]) -> dict[str, dict[str, object]]:
    return merged(TINY_BYTE_RUN, {"data": {"path": str(byte_corpus)}, "schedule": {"max_steps": STEPS}}, sections)


class References:
    """Curves of single-process DDP, one per precision and optimizer, trained at first use."""

    def __init__(self, byte_corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = byte_corpus, folder
        self.curves: dict[tuple[str, str], Curve] = {}

    def __getitem__(self, key: str | tuple[str, str]) -> Curve:
        """Return the curve of a precision under AdamW, or of a precision and an optimizer."""
        precision, optimizer = key if isinstance(key, tuple) else (key, "adamw")
        if (precision, optimizer) not in self.curves:
            sections = tiny_run(self.corpus, run={"precision": precision}, optimizer={"name": optimizer})
            folder = self.folder / f"{precision}-{optimizer}"
            self.curves[precision, optimizer] = curve_of("ddp", folder, sections)
        return self.curves[precision, optimizer]


@pytest.fixture(scope="module")
def references(byte_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(byte_corpus, tmp_path_factory.mktemp("references"))


def test_the_reference_learns_and_clips(references: References) -> None:
    """Without this, equal curves would prove little: the loss falls, and clipping is active at most steps."""
    curve = references["fp32"]
    assert len(curve.losses) == STEPS
    assert curve.losses[-1] < curve.losses[0] - 0.5
    assert sum(norm > TINY_BYTE_RUN["optimizer"]["grad_clip"] for norm in curve.grad_norms) > STEPS * 0.8


@pytest.fixture(scope="module")
def watched(byte_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the watched run of single-process DDP."""
    folder = tmp_path_factory.mktemp("watched")
    curve_of("ddp", folder, watched_run(byte_corpus))
    return folder


def watched_run(byte_corpus: Path) -> dict[str, dict[str, object]]:
    """Return a run with a moving average of the weights, validations, and the norms of layer groups."""
    logging = {"norms_every_steps": 1}
    return tiny_run(byte_corpus, averaging={"ema": 0.9}, evaluation={"every_steps": 5}, logging=logging)


def validation_losses(run_folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(run_folder) if key in row]


def names_of(run_folder: Path) -> list[list[str]]:
    """Return the names in each training row, without the comparison of ranks, which needs several ranks."""
    compares_ranks = re.compile(r"(compute|data_wait|collective_wait)_ms_|slowest_")
    rows = [row for row in read_metrics(run_folder) if "loss" in row]
    return [sorted(name for name in row if not compares_ranks.match(name)) for row in rows]


def first_norms(run_folder: Path) -> dict[str, float]:
    """Return the norms of the layer groups after the first step."""
    row = next(row for row in read_metrics(run_folder) if any(key.startswith(LAYER_PREFIX) for key in row))
    assert row["step"] == 1
    return {key: value for key, value in row.items() if key.startswith(LAYER_PREFIX)}


def test_watching_a_run_does_not_change_it(references: References, watched: Path) -> None:
    assert read_curve(watched) == references["fp32"]
    own, of_average = (validation_losses(watched, key) for key in ("val_loss", "val_ema_loss"))
    assert len(own) == len(of_average) == 3
    assert own[0] == of_average[0], "the average starts as a copy"
    assert all(a > b for a, b in zip(of_average[1:], own[1:], strict=True)), "it lags behind"
    assert len(first_norms(watched)) == 3 * (2 * TINY_BYTE_RUN["model"]["n_layer"] + 2)


@pytest.mark.parametrize(
    ("backend", "processes"),
    [(backend, processes) for processes in PROCESSES for backend in BACKENDS if (backend, processes) != ("ddp", 1)]
    + [("fsdp/2", 4), ("zero2_offload", 2), ("zero3_offload", 2)],
)
def test_fp32_runs_agree(backend: str, processes: int, byte_corpus: Path, watched: Path, tmp_path: Path) -> None:
    """The curves, the norms of layer groups, the averages of the weights, and the validation losses of both agree.

    Rows have the same names.
    """
    curve, expected = curve_of(backend, tmp_path, watched_run(byte_corpus), processes), read_curve(watched)
    assert curve.largest_loss_difference(expected) <= LOSS_TOLERANCE["fp32"]
    assert curve.largest_grad_norm_difference(expected) <= GRAD_NORM_TOLERANCE
    assert names_of(tmp_path) == names_of(watched)
    assert first_norms(tmp_path) == pytest.approx(first_norms(watched), rel=1e-6)
    assert largest_average_difference(tmp_path, watched) <= LOSS_TOLERANCE["fp32"]
    for key in ("val_loss", "val_ema_loss"):
        losses = pytest.approx(validation_losses(watched, key), rel=0, abs=LOSS_TOLERANCE["fp32"])
        assert validation_losses(tmp_path, key) == losses


@pytest.mark.parametrize(
    ("backend", "processes"),
    [("ddp", 2), ("fsdp", 4), ("zero0", 2), ("zero1", 2), ("zero2_offload", 2), ("zero3", 1), ("zero3_offload", 2)],
)
def test_curves_of_muon_agree(
    backend: str, processes: int, byte_corpus: Path, references: References, tmp_path: Path
) -> None:
    reference = references["fp32", "muon"]
    curve = curve_of(backend, tmp_path, tiny_run(byte_corpus, optimizer={"name": "muon"}), processes)
    assert reference.largest_loss_difference(references["fp32"]) > 1e-2, "Muon is in use"
    assert curve.largest_loss_difference(reference) <= LOSS_TOLERANCE["fp32"]
    assert curve.largest_grad_norm_difference(reference) <= GRAD_NORM_TOLERANCE


@pytest.mark.parametrize(
    ("precision", "backend", "processes"),
    [
        ("bf16", "fsdp", 2),
        ("bf16", "zero0", 2),
        ("bf16", "zero1", 1),
        ("bf16", "zero1", 2),
        ("bf16", "zero2", 2),
        ("bf16", "zero3", 2),
        ("amp_bf16", "fsdp", 2),
        ("amp_bf16", "zero1", 2),
        ("amp_bf16", "zero3", 1),
        ("amp_fp16", "fsdp", 2),
        ("amp_fp16", "zero0", 1),
        ("amp_fp16", "zero2", 2),
        ("amp_fp16", "zero3", 1),
    ],
)
def test_curves_agree_in_lower_precision(
    precision: str, backend: str, processes: int, byte_corpus: Path, references: References, tmp_path: Path
) -> None:
    curve = curve_of(backend, tmp_path, tiny_run(byte_corpus, run={"precision": precision}), processes)
    assert curve.largest_loss_difference(references[precision]) <= LOSS_TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16", "bf16"])
def test_lower_precision_is_really_in_use(precision: str, references: References) -> None:
    """The curve is close to fp32 but differs from it: autocast or the bf16 weights are in use."""
    difference = references[precision].largest_loss_difference(references["fp32"])
    assert LOSS_TOLERANCE["fp32"] < difference < 0.1


@pytest.mark.parametrize("masked", [False, True], ids=["all targets", "masked targets"])
def test_the_split_of_the_batch_does_not_change_the_curve(masked: bool, byte_corpus: Path, tmp_path: Path) -> None:
    """Micro-batches of 1, 2, 4 on 1 and 2 processes; with masks, their numbers of targets differ widely."""
    rows = list(compare_accumulation(byte_corpus, tmp_path, masked=masked, steps=STEPS, base=TINY_BYTE_RUN))
    assert len(rows) == 5
    assert [row for row in rows if not row.agrees] == []


def test_masked_targets_change_the_curve(byte_corpus: Path, references: References, tmp_path: Path) -> None:
    """The mask of the test above is in use."""
    curve = curve_of("ddp", tmp_path / "run", tiny_run(copy_with_masks(byte_corpus, tmp_path / "data")))
    assert curve.largest_loss_difference(references["fp32"]) > 1e-2


def test_dropout_and_recomputation_agree_too(byte_corpus: Path, tmp_path: Path) -> None:
    """Dropout depends on seed and samples only, so it is the same on every backend and world size."""
    reference = curve_of("ddp", tmp_path / "reference", tiny_run(byte_corpus, model={"dropout": 0.1}))
    sections = tiny_run(byte_corpus, model={"dropout": 0.1, "activation_checkpointing": True})
    for backend in ("fsdp", "zero3"):
        curve = curve_of(backend, tmp_path / backend, sections, processes=2)
        assert curve.largest_loss_difference(reference) <= LOSS_TOLERANCE["fp32"], backend

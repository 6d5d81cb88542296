"""Losses and gradients that are not finite, or that spike."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.state import read_state
from pipeline.checkpoint.verification import find_damage
from pipeline.run_folder.metrics import read_metrics
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.runs import REPOSITORY, Sections, merged, train_run
from tests.survival.conftest import steps_of

FAULTY_TRAIN = REPOSITORY / "tests" / "support" / "faulty_train.py"


def train(backend: str, processes: int, folder: Path, sections: Sections, samples: str, fault: str) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FAULTY_SAMPLES", samples)
        environment.setenv("FAULT", fault)
        result = train_run(backend, folder, sections, processes, FAULTY_TRAIN)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("backend", "processes", "precision"),
    [("ddp", 1, "fp32"), ("fsdp", 2, "bf16"), ("zero0", 2, "fp32"), ("zero1", 1, "bf16"), ("zero2", 2, "fp32")]
    + [("zero3", 2, "fp32"), ("zero3", 1, "bf16"), ("ddp", 2, "amp_fp16")],
)
def test_a_step_that_is_not_finite_is_skipped(
    backend: str, processes: int, precision: str, sections: Sections, tmp_path: Path
) -> None:
    """Step 3 has samples 8 to 11; sample 9 is bad, on one rank only."""
    sections = merged(sections, {"run": {"precision": precision}, "schedule": {"max_steps": 5}})
    status, output = train(backend, processes, tmp_path / "run", sections, "9", "nan")
    assert status == 0, output
    assert output.count("not finite, the step is skipped") == 1
    assert "step 3: gradient norm" in output and "(samples 8 to 11)" in output
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped_samples"] for row in rows if "skipped_samples" in row] == [[8, 12]]
    by_step = {row["step"]: row for row in rows if "loss" in row}
    assert by_step[3]["grad_norm"] is None
    assert [by_step[step]["skipped_steps"] for step in (2, 3, 5)] == [0, 1, 1]
    assert all(by_step[step]["loss"] is not None for step in (4, 5))
    state, _ = read_state(list_checkpoints(tmp_path / "run")[-1])
    assert (state.step, state.updates) == (5, 4)


def test_a_skip_is_the_same_on_every_backend(sections: Sections, tmp_path: Path) -> None:
    sections = merged(sections, {"schedule": {"max_steps": 6}})
    for backend, processes in (("ddp", 1), ("zero2", 2), ("fsdp", 1), ("zero3", 2)):
        train(backend, processes, tmp_path / backend, sections, "9", "inf")
    curves = {backend: read_metrics(tmp_path / backend) for backend in ("ddp", "zero2", "fsdp", "zero3")}
    losses = {
        backend: [row["loss"] for row in rows if "loss" in row and row["step"] != 3] for backend, rows in curves.items()
    }
    for backend in losses:
        differences = [abs(a - b) for a, b in zip(losses[backend], losses["ddp"], strict=True)]
        assert max(differences) <= LOSS_TOLERANCE["fp32"], backend


@pytest.mark.parametrize(("backend", "processes"), [("ddp", 1), ("zero1", 2)])
def test_too_many_in_a_row_stop_the_run(backend: str, processes: int, sections: Sections, tmp_path: Path) -> None:
    sections = merged(sections, {"guard": {"max_bad_steps": 3}})
    bad = ",".join(str(sample) for sample in range(16, 100))  # from step 5 on
    status, output = train(backend, processes, tmp_path / "run", sections, bad, "nan")
    assert status != 0
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "step 7" in line and "samples 24 to 27" in line and "3 steps in a row were not finite" in line
    assert "Traceback" not in output
    assert steps_of(tmp_path / "run") == [4]
    assert find_damage(list_checkpoints(tmp_path / "run")[0]) is None


@pytest.mark.parametrize(("backend", "processes"), [("ddp", 1), ("fsdp", 2), ("zero2", 2)])
def test_a_spike_rolls_the_run_back_and_leaves_the_batch_out(
    backend: str, processes: int, sections: Sections, tmp_path: Path
) -> None:
    guarded = merged(
        sections,
        {
            "schedule": {"max_steps": 18},
            "guard": {"spike_zscore": 12.0, "spike_window": 10},
            "logging": {"sinks": ["jsonl", "tensorboard", "console"]},
        },
    )
    folder = tmp_path / "run"
    status, output = train(backend, processes, folder, guarded, "53", "1000")  # step 14: 52 to 55
    assert status == 0, output
    assert "samples 52 to 55 are left out" in output and "step_00000012" in output
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 19)), "a gap or a duplicate"
    assert [row["left_out_samples"] for row in rows if "left_out_samples" in row] == [[52, 56]]
    state, _ = read_state(list_checkpoints(folder)[-1])
    assert (state.step, state.updates, state.samples) == (18, 18, 19 * 4)
    assert state.guard.skipped_samples == ((52, 56),) and state.guard.rollbacks == 1
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/training")] == list(range(1, 19))

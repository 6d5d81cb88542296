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
FIVE_STEPS: Sections = {"schedule": {"max_steps": 5}}


@pytest.fixture(scope="module")
def skipping(sections: Sections, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of single-process DDP without step 3, which is skipped."""
    folder = tmp_path_factory.mktemp("skipping")
    train("ddp", 1, folder, merged(sections, FIVE_STEPS), "9", "nan")
    return finite_losses(folder)


def finite_losses(run_folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_folder) if "loss" in row and row["step"] != 3]


def train(backend: str, processes: int, folder: Path, sections: Sections, samples: str, fault: str) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FAULTY_SAMPLES", samples)
        environment.setenv("FAULT", fault)
        result = train_run(backend, folder, sections, processes, FAULTY_TRAIN)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("backend", "processes", "precision", "fault"),
    [
        ("ddp", 1, "fp32", "nan"),
        ("fsdp", 2, "fp32", "inf"),
        ("zero0", 2, "fp32", "nan"),
        ("zero1", 1, "bf16", "nan"),
        ("zero2", 2, "fp32", "inf"),
        ("zero3", 2, "fp32", "nan"),
        ("zero3", 1, "bf16", "nan"),
        ("fsdp", 2, "bf16", "nan"),
        ("ddp", 2, "amp_fp16", "nan"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped(
    backend: str, processes: int, precision: str, fault: str, sections: Sections, tmp_path: Path, skipping: list[float]
) -> None:
    """Step 3 has samples 8 to 11; sample 9 is bad, on one rank only. In fp32, all curves agree."""
    sections = merged(sections, FIVE_STEPS, {"run": {"precision": precision}})
    status, output = train(backend, processes, tmp_path / "run", sections, "9", fault)
    assert status == 0, output
    assert output.count("not finite, the step is skipped") == 1
    assert "step 3: gradient norm" in output and "(samples 8 to 11)" in output
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped_samples"] for row in rows if "skipped_samples" in row] == [[8, 12]]
    by_step = {row["step"]: row for row in rows if "loss" in row}
    assert by_step[3]["grad_norm"] is None
    assert [by_step[step]["skipped_steps"] for step in (2, 3, 5)] == [0, 1, 1]
    assert all(by_step[step]["loss"] is not None for step in (4, 5))
    if precision == "fp32":
        assert finite_losses(tmp_path / "run") == pytest.approx(skipping, rel=0, abs=LOSS_TOLERANCE["fp32"])
    state, _ = read_state(list_checkpoints(tmp_path / "run")[-1])
    assert (state.step, state.updates) == (5, 4)


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


@pytest.fixture(scope="module")
def rolled_back_losses() -> list[float]:
    """Collect the losses of the first backend, with which the other backends must agree."""
    return []


@pytest.mark.parametrize(("backend", "processes"), [("ddp", 1), ("fsdp", 2), ("zero2", 2)])
def test_a_spike_rolls_the_run_back_and_leaves_the_batch_out(
    backend: str, processes: int, sections: Sections, tmp_path: Path, rolled_back_losses: list[float]
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
    losses = [row["loss"] for row in rows if "loss" in row]
    rolled_back_losses[:] = rolled_back_losses or losses
    assert losses == pytest.approx(rolled_back_losses, rel=0, abs=LOSS_TOLERANCE["fp32"])
    state, _ = read_state(list_checkpoints(folder)[-1])
    assert (state.step, state.updates, state.samples) == (18, 18, 19 * 4)
    assert state.guard.skipped_samples == ((52, 56),) and state.guard.rollbacks == 1
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/training")] == list(range(1, 19))

"""A short run and its uninterrupted curve, with which interrupted runs are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.state import read_state
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.runs import REPOSITORY, TINY_BYTE_RUN, TINY_RUN, Curve, Sections, curve_of, merged, read_curve

STEPS, EVERY_STEPS = 14, 4
STUCK_TRAIN = REPOSITORY / "tests" / "support" / "stuck_train.py"

SHORT_RUN: Sections = {
    "model": {"dropout": 0.1},
    "batch": {"tokens_per_step": 192, "micro_batch_size": 1},
    "schedule": {"max_steps": STEPS},
    "checkpoint": {"every_steps": EVERY_STEPS},
    "evaluation": {"every_steps": 5},
}


@pytest.fixture(scope="session")
def sections(byte_corpus: Path) -> Sections:
    """Return the config of a run that takes a few seconds."""
    return merged(TINY_BYTE_RUN, SHORT_RUN, {"data": {"path": str(byte_corpus)}})


@pytest.fixture(scope="session")
def large_sections(corpus: Path) -> Sections:
    """Return the same config with GPT-2's vocabulary: a checkpoint takes 32 MB, other files very little."""
    return merged(TINY_RUN, SHORT_RUN, {"data": {"path": str(corpus)}})


@pytest.fixture(scope="session")
def whole_folder(sections: Sections, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    curve_of("ddp", folder, sections)
    return folder


@pytest.fixture(scope="session")
def whole(whole_folder: Path) -> Curve:
    """Return the curve of the uninterrupted run."""
    return read_curve(whole_folder)


def break_rank(monkeypatch: pytest.MonkeyPatch, rank: int, where: str, how: str, after: int = 6) -> None:
    """Break a rank of ``STUCK_TRAIN`` after some steps."""
    fault = {"STUCK_RANK": str(rank), "STUCK_STEP": str(after), "STUCK_WHERE": where, "STUCK_HOW": how}
    for name, value in fault.items():
        monkeypatch.setenv(name, value)


def steps_of(run_folder: Path) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return [read_state(folder)[0].step for folder in list_checkpoints(run_folder)]


def assert_same_curve(run_folder: Path, whole: Curve) -> None:
    """Check that every step was logged once, with losses within the tolerance between backends."""
    curve = read_curve(run_folder)
    assert len(curve.losses) == len(whole.losses), "a gap or a duplicate"
    assert curve.largest_loss_difference(whole) <= LOSS_TOLERANCE["fp32"]

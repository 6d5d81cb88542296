"""A run on a weighted mixture, of which one dataset has a mask: the same at any world size and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder.metrics import read_metrics
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.runs import (
    TINY_BYTE_RUN,
    Curve,
    Sections,
    copy_with_masks,
    curve_of,
    make_byte_corpus,
    merged,
    train_run,
)
from tests.test_resume import forget_after, weights_of

STEPS, SAVED_AT = 8, 4


@pytest.fixture(scope="module")
def components(byte_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixture")
    masked = copy_with_masks(make_byte_corpus(folder / "few", documents=9), folder / "answers")
    return [{"path": str(byte_corpus), "weight": 0.7, "name": "text"}, {"path": str(masked), "weight": 0.3}]


def run_sections(components: list[dict[str, Any]]) -> Sections:
    return merged(
        TINY_BYTE_RUN,
        {
            "data": {"mixture": components},
            "model": {"dropout": 0.1, "reset_positions_at": 256},
            "schedule": {"max_steps": STEPS},
            "checkpoint": {"every_steps": SAVED_AT, "keep_last": 5},
            "evaluation": {"every_steps": SAVED_AT},
        },
    )


@pytest.fixture(scope="module")
def alone(components: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """Return the curve of one process."""
    return curve_of("ddp", tmp_path_factory.mktemp("alone"), run_sections(components))


def test_two_processes_have_the_curve_of_one_and_continue_it_bit_for_bit(
    components: list[dict[str, Any]], alone: Curve, tmp_path: Path
) -> None:
    whole = curve_of("fsdp", tmp_path, run_sections(components), processes=2)
    weights = weights_of(tmp_path)
    assert whole.largest_loss_difference(alone) <= LOSS_TOLERANCE["fp32"]

    forget_after(tmp_path, SAVED_AT)
    assert curve_of("fsdp", tmp_path, run_sections(components), processes=2) == whole
    assert weights_of(tmp_path) == weights

    rows = read_metrics(tmp_path)
    assert all(0 <= row["data_wait_share"] < 1 for row in rows if "loss" in row)
    validations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in validations] == [0, SAVED_AT, STEPS]
    for row in validations:
        assert row["val_loss"] == pytest.approx(0.7 * row["val_loss_text"] + 0.3 * row["val_loss_answers"])
    assert validations[-1]["val_loss_text"] < validations[0]["val_loss_text"]


def test_other_weights_are_another_run(components: list[dict[str, Any]], alone: Curve, tmp_path: Path) -> None:
    """Other weights change the curve, and do not continue a checkpoint of the first weights."""
    other = [{**components[0], "weight": 0.3}, {**components[1], "weight": 0.7}]
    curve = curve_of("ddp", tmp_path, run_sections(other))
    assert curve.largest_loss_difference(alone) > 1e-3
    forget_after(tmp_path, SAVED_AT)
    result = train_run("ddp", tmp_path, run_sections(components))
    assert result.returncode == 2
    assert "was trained on other data than data.mixture now has" in result.stderr.splitlines()[-1]

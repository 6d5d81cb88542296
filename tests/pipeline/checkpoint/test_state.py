"""A malformed ``state.json`` with a correct hash is rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.loading import load_training_state
from pipeline.checkpoint.state import ValidationHistory, read_state
from pipeline.checkpoint.verification import find_damage
from pipeline.distributed.world import World
from tests.pipeline.checkpoint.conftest import STATE, assert_rejected, edit_state, make_backend, seal

#: Keys of ``state.json``, and values of the wrong type.
COUNTS = ("step", "samples", "tokens", "updates", "seed", "loss_scale_good_steps")
WRONG_STATES: list[tuple[str, Any]] = [
    *[(key, value) for key in COUNTS for value in ("3", None, 3.5, True)],
    *[("loss_scale", value) for value in ("1.0", True)],
    ("data_sha256", 7),
    ("tokenizer", "gpt2"),
    ("tokenizer", {"name": "gpt2"}),
    ("world_size", "1"),
    ("versions", None),
    ("versions", {"torch": 2}),
    ("config", None),
    ("config", [1]),
    ("guard", None),
    ("guard", 3),
    ("guard", {"bad_in_a_row": "1"}),
    ("guard", {"rollbacks": 1.5}),
    ("guard", {"skipped_samples": [[1]]}),
    ("guard", {"skipped_samples": [[1, 2, 3]]}),
    ("guard", {"skipped_samples": 4}),
    ("guard", {"recent": [["low", 1.0]]}),
    ("guard", {"recent": [1.0]}),
]
OUT_OF_RANGE: list[tuple[str, Any]] = [
    *[(key, -1) for key in COUNTS],
    *[("loss_scale", value) for value in (0.0, -1.0, float("nan"), float("inf"))],
    ("guard", {"bad_in_a_row": -1}),
    ("guard", {"rollbacks": -1}),
    ("guard", {"skipped_samples": [[-4, 4]]}),
    ("world_size", 0),
]


@pytest.mark.parametrize(("key", "value"), WRONG_STATES, ids=lambda value: json.dumps(value)[:32])
def test_a_value_of_the_wrong_type_is_rejected(folder: Path, world: World, key: str, value: Any) -> None:
    edit_state(folder, lambda state: state.update({key: value}))
    assert_rejected(folder, world, folder / STATE, f"malformed .*{key}", weights_too=False)


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE, ids=lambda value: json.dumps(value)[:32])
def test_a_value_out_of_range_is_rejected(folder: Path, world: World, key: str, value: Any) -> None:
    edit_state(folder, lambda state: state.update({key: value}))
    assert_rejected(folder, world, folder / STATE, f"malformed .*{key}", weights_too=False)


@pytest.mark.parametrize("key", [*COUNTS, "loss_scale", "world_size"])
def test_a_missing_value_is_rejected(folder: Path, world: World, key: str) -> None:
    edit_state(folder, lambda state: state.pop(key))
    assert_rejected(folder, world, folder / STATE, f"malformed .*{key}", weights_too=False)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", "[" * 100_000],
    ids=lambda text: text[:4] or "nothing",
)
def test_anything_but_an_object_is_rejected(folder: Path, world: World, content: str) -> None:
    (folder / STATE).write_text(content)
    seal(folder)
    assert_rejected(folder, world, folder / STATE, "", weights_too=False)


def test_a_state_of_an_earlier_version_is_accepted(folder: Path, world: World) -> None:
    edit_state(folder, lambda state: [state.pop(key) for key in ("guard", "data_sha256", "tokenizer")])
    assert find_damage(folder) is None
    state = load_training_state(folder, make_backend(world, seed=2))
    assert (state.data_sha256, state.tokenizer) == (None, None)


@pytest.mark.parametrize(("best_step", "expected"), [(0, ValidationHistory()), (2, ValidationHistory(2.0, 2, 1))])
def test_a_best_loss_at_step_0_does_not_count(folder: Path, best_step: int, expected: ValidationHistory) -> None:
    """Earlier versions compared the later losses with it, for early stopping and ``checkpoint.keep_best``."""
    history = {"best_loss": 2.0, "best_step": best_step, "evaluations_since_best": 1}
    edit_state(folder, lambda state: state.update(validation=history))
    assert read_state(folder)[0].validation == expected

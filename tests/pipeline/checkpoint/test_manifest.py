"""A manifest that is malformed or names files outside the checkpoint is rejected, even with a correct hash."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.verification import find_damage
from pipeline.distributed.world import World
from tests.pipeline.checkpoint.conftest import MANIFEST, POSITIONS, STATE, WEIGHTS, assert_rejected, edit_manifest

OUTSIDE = ["../outside.safetensors", "/etc/passwd", "sub/file", f"./{WEIGHTS}", f"sub/../{WEIGHTS}", "..", "."]
OTHER_NAMES = ["", "model.pt", "rank_0_weights.safetensors", f"{WEIGHTS}.bak", "rank_00000_loss.safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, *OTHER_NAMES], ids=repr)
def test_a_file_name_that_does_not_belong_to_a_checkpoint_is_rejected(folder: Path, world: World, name: str) -> None:
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / WEIGHTS).read_bytes())
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: manifest["files"].pop(WEIGHTS)}))
    assert_rejected(folder, world, folder / MANIFEST, re.escape(repr(name)))


@pytest.mark.parametrize(
    "entry", [None, 7, [], {}, {"bytes": 1}, {"sha256": "0" * 64}], ids=lambda value: json.dumps(value)[:16]
)
def test_a_file_without_size_or_hash_is_rejected(folder: Path, world: World, entry: Any) -> None:
    edit_manifest(folder, lambda manifest: manifest["files"].update({WEIGHTS: entry}))
    assert_rejected(folder, world, folder / MANIFEST, "malformed")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bytes", "12"),
        ("bytes", 1.5),
        ("bytes", -1),
        ("bytes", None),
        ("finite", "yes"),
        ("sha256", 3),
        ("sha256", "0" * 63),
        ("sha256", "G" * 64),
    ],
)
def test_a_malformed_value_of_a_file_is_rejected(folder: Path, world: World, key: str, value: Any) -> None:
    edit_manifest(folder, lambda manifest: manifest["files"][WEIGHTS].update({key: value}))
    assert_rejected(folder, world, folder / MANIFEST, re.escape(f"malformed (files.{WEIGHTS}.{key}: "))


@pytest.mark.parametrize(
    "shape",
    [
        None,
        12,
        "12",
        [12, "21"],
        [12, 0],
        [12, -21],
        [12.0, 21],
        [12, None],
        [[12], 21],
        [2**80, 21],
        [2**62, 8],
        [2**40, 2**40],
    ],
    ids=lambda value: json.dumps(value)[:16],
)
def test_a_malformed_shape_is_rejected(folder: Path, world: World, shape: Any) -> None:
    edit_manifest(folder, lambda manifest: manifest["parameters"].update({POSITIONS: shape}))
    found = find_damage(folder)
    assert (
        found is not None
        and found.startswith(f"{folder / MANIFEST}: malformed (parameters.{POSITIONS}")
        and "\n" not in found
    )
    assert_rejected(folder, world, folder / MANIFEST, "malformed")


@pytest.mark.parametrize(
    "names", [None, 3, ["weight"], ["exp_avg", "exp_avg"], ["exp_avg", "../x"], [1], ["Exp"]], ids=json.dumps
)
def test_malformed_names_of_the_optimizers_state_are_rejected(folder: Path, world: World, names: Any) -> None:
    edit_manifest(folder, lambda manifest: manifest["optimizer_state"].update({POSITIONS: names}))
    assert_rejected(folder, world, folder / MANIFEST, "malformed")


def test_optimizer_state_of_other_parameters_is_rejected(folder: Path, world: World) -> None:
    edit_manifest(folder, lambda manifest: manifest["optimizer_state"].pop(POSITIONS))
    assert_rejected(folder, world, folder / MANIFEST, "name different parameters")


def test_a_manifest_without_the_state_is_rejected(folder: Path, world: World) -> None:
    edit_manifest(folder, lambda manifest: manifest["files"].pop(STATE))
    assert_rejected(folder, world, folder / MANIFEST, "does not name state.json")


def test_endless_nesting_is_rejected(folder: Path, world: World) -> None:
    (folder / MANIFEST).write_text("[" * 100_000)
    assert_rejected(folder, world, folder / MANIFEST, "cannot be read")

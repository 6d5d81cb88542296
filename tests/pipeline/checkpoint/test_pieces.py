"""Pieces of any cut make the whole, and what is sealed and hashed but makes no sense is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.backends import Backend, Fragment
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import find_damage, load_training_state, load_weights, save_checkpoint
from pipeline.checkpoint.folder import pieces_file
from pipeline.checkpoint.pieces import KINDS, WEIGHT, piece_key
from pipeline.checkpoint.snapshot import cut, own_share
from pipeline.config.loading import dump_config
from pipeline.distributed.world import World, join_world
from pipeline.errors import CheckpointError
from pipeline.model.gpt2 import build_model
from tests.pipeline.checkpoint.conftest import (
    MANIFEST,
    MOMENTS,
    STATE,
    WEIGHTS,
    Save,
    assert_same,
    contents,
    edit_manifest,
    edit_state,
    edit_tensors,
    make_backend,
    seal,
    state_of,
    train_steps,
    unchanged,
    updates_of,
)
from tests.pipeline.conftest import TINY_MODEL, tiny_config, tiny_model_config

POSITIONS, POSITIONS_SHAPE = "wpe.weight", (TINY_MODEL["context_length"], TINY_MODEL["n_embd"])
N = TINY_MODEL["context_length"] * TINY_MODEL["n_embd"]


def cut_into_runs(fragments: list[Fragment], run: int) -> list[Fragment]:
    """The same state in runs of a few elements, which know nothing of rows."""
    return [
        cut(fragment, low, min(low + run, fragment.weight.numel()))
        for fragment in fragments
        for low in range(0, fragment.weight.numel(), run)
    ]


class ShardedBackend(Backend):
    """Every second run of another backend's elements: what one of two ranks has under ZeRO."""

    compute = accumulate = step = dtypes = describe = None  # type: ignore[assignment]

    def __init__(self, whole: DdpBackend, run: int, rank: int) -> None:
        super().__init__(whole.model, whole.loss_scaler)
        self.whole, self.mine = whole, cut_into_runs(whole.fragments(), run)[rank::2]

    def fragments(self) -> list[Fragment]:
        return self.mine

    def state_was_loaded(self, updates: int) -> None:
        self.whole.state_was_loaded(updates)


class TestCuts:
    """What sharded ranks wrote loads into a whole model, and the other way round."""

    @staticmethod
    def rewrite(folder: Path, backend: Backend, fragments_of_rank: list[list[Fragment]]) -> None:
        """The same checkpoint as several ranks would have written it."""
        for rank, fragments in enumerate(fragments_of_rank):
            parts: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}}
            for fragment in fragments:
                shape, n = backend.parameter_shapes[fragment.name], fragment.weight.numel()
                run = None if n == shape.numel() else (fragment.start, fragment.start + n)
                for kind in KINDS:
                    tensor = getattr(fragment, kind).view(shape if run is None else (n,)).clone()
                    parts["weights" if kind == WEIGHT else "moments"][piece_key(kind, fragment.name, run)] = tensor
            for part, tensors in parts.items():
                save_file(tensors, folder / pieces_file(rank, part))
        seal(folder)

    @pytest.mark.parametrize("run", [1000, 64, 33])
    def test_pieces_make_the_whole(self, save: Save, backend: DdpBackend, world: World, run: int) -> None:
        folder = save()
        pieces = cut_into_runs(backend.fragments(), run)
        self.rewrite(folder, backend, [pieces[0::2], pieces[1::2]])
        assert find_damage(folder) is None
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        assert_same(contents(other), contents(backend))
        model = build_model(tiny_model_config(), 9)
        load_weights(folder, {name: parameter.detach() for name, parameter in model.named_parameters()})
        for name, parameter in backend.model.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name

    @pytest.mark.parametrize(("stored_run", "loaded_run"), [(None, 50), (64, 50), (50, 64), (33, 1000)])
    def test_pieces_of_one_cut_load_into_another(
        self, save: Save, backend: DdpBackend, world: World, stored_run: int | None, loaded_run: int
    ) -> None:
        folder = save()
        if stored_run:
            pieces = cut_into_runs(backend.fragments(), stored_run)
            self.rewrite(folder, backend, [pieces[0::2], pieces[1::2]])
        other = make_backend(world, seed=2)
        first_half = ShardedBackend(other, loaded_run, rank=0)
        load_training_state(folder, first_half)
        assert any(
            not torch.equal(a, b) for a, b in zip(contents(other).values(), contents(backend).values(), strict=True)
        )
        load_training_state(folder, ShardedBackend(other, loaded_run, rank=1))
        assert_same(contents(other), contents(backend))
        assert updates_of(other) == 3

    @pytest.mark.parametrize("ranks", [2, 3, 50])
    def test_ranks_that_all_hold_everything_share_the_writing(
        self, save: Save, backend: DdpBackend, world: World, ranks: int
    ) -> None:
        folder = save()
        shares = [own_share(backend, replace(world, rank=rank, size=ranks)) for rank in range(ranks)]
        sizes = [sum(fragment.weight.numel() for fragment in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        self.rewrite(folder, backend, shares)
        assert find_damage(folder) is None
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        assert_same(contents(other), contents(backend))

    def test_ranks_that_hold_parts_write_them_all(self, backend: DdpBackend, world: World) -> None:
        sharded = ShardedBackend(backend, 64, rank=1)
        assert own_share(sharded, replace(world, rank=1, size=2)) == sharded.fragments()

    def test_a_missing_piece_is_an_error(self, save: Save, backend: DdpBackend, world: World) -> None:
        folder = save()
        pieces = cut_into_runs(backend.fragments(), 64)
        self.rewrite(folder, backend, [pieces[0::2], pieces[1:-2:2]])
        with pytest.raises(CheckpointError, match="elements of .* are missing"):
            load_training_state(folder, make_backend(world, seed=2))


Tensors = dict[str, Tensor]


def split_at(*runs: tuple[int, int]) -> Callable[[Tensors], None]:
    """The positions' weight as these runs of its elements, beginning anew where it is too short."""

    def change(tensors: Tensors) -> None:
        elements = tensors.pop(POSITIONS).flatten().repeat(2)
        for start, stop in runs:
            tensors[f"{POSITIONS}[{start}:{stop}]"] = elements[start : max(start, stop)].clone()

    return change


def store_as(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[POSITIONS] = change(tensors[POSITIONS])

    return apply


def rename(before: str, after: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[after] = tensors.pop(before)

    return change


#: What is wrong: where it stands, how it comes about, and what the line says beside the file.
WRONG_TENSORS: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "turned": (WEIGHTS, store_as(lambda t: t.T), r"wpe.weight has shape \[21, 12\], expected \[12, 21\]"),
    "flat": (WEIGHTS, store_as(torch.flatten), r"wpe.weight has shape \[252\], expected \[12, 21\]"),
    "one row short": (WEIGHTS, store_as(lambda t: t[:-1]), r"wpe.weight has shape \[11, 21\]"),
    "one row more": (WEIGHTS, store_as(lambda t: torch.cat([t, t[:1]])), r"wpe.weight has shape \[13, 21\]"),
    "a scalar": (WEIGHTS, store_as(lambda t: t[0, 0].clone()), r"wpe.weight has shape \[\]"),
    "half precision": (WEIGHTS, store_as(Tensor.half), "wpe.weight is F16, expected F32"),
    "bf16": (WEIGHTS, store_as(Tensor.bfloat16), "wpe.weight is BF16, expected F32"),
    "double precision": (WEIGHTS, store_as(Tensor.double), "wpe.weight is F64, expected F32"),
    "integers": (WEIGHTS, store_as(Tensor.int), "wpe.weight is I32, expected F32"),
    "half a moment": (
        MOMENTS,
        lambda tensors: tensors.update({f"exp_avg_sq/{POSITIONS}": tensors[f"exp_avg_sq/{POSITIONS}"].half()}),
        "exp_avg_sq/wpe.weight is F16, expected F32",
    ),
    "unknown name": (WEIGHTS, lambda tensors: tensors.update({"x": torch.ones(2)}), "holds 'x', which the manifest"),
    "unknown moment": (MOMENTS, lambda tensors: tensors.update({"exp_avg/x": torch.ones(2)}), "holds 'exp_avg/x'"),
    "a moment among weights": (
        WEIGHTS,
        lambda tensors: tensors.update({f"exp_avg/{POSITIONS}": torch.ones(POSITIONS_SHAPE)}),
        "holds 'exp_avg/wpe.weight'",
    ),
    "run beyond the end": (WEIGHTS, split_at((0, N + 1)), r"wpe.weight\[0:253\] has shape \[253\]"),
    "run after the end": (WEIGHTS, split_at((0, N), (N, N + 3)), r"wpe.weight\[252:255\] has shape \[3\]"),
    "run of nothing": (WEIGHTS, split_at((0, N), (5, 5)), r"wpe.weight\[5:5\] has shape \[0\]"),
    "run backwards": (WEIGHTS, split_at((0, N), (7, 3)), r"wpe.weight\[7:3\] has shape"),
    "run shorter than it says": (
        WEIGHTS,
        lambda tensors: tensors.update({f"{POSITIONS}[0:{N}]": tensors.pop(POSITIONS).flatten()[:-1]}),
        r"wpe.weight\[0:252\] has shape \[251\], expected \[252\]",
    ),
    "run in rows": (
        WEIGHTS,
        rename(POSITIONS, f"{POSITIONS}[0:{N}]"),
        r"wpe.weight\[0:252\] has shape \[12, 21\], expected \[252\]",
    ),
    "run too long to count": (WEIGHTS, rename(POSITIONS, f"{POSITIONS}[0:{'9' * 5000}]"), "integer string|has shape"),
    "pieces overlap": (WEIGHTS, split_at((0, 10), (9, N)), r"wpe.weight\[9:252\] overlaps another piece"),
    "a piece inside another": (WEIGHTS, split_at((0, N), (3, 5)), r"wpe.weight\[3:5\] overlaps another piece"),
    "a moment without its kind": (MOMENTS, rename(f"exp_avg/{POSITIONS}", POSITIONS), "'wpe.weight' is no moment"),
    "a moment of another kind": (
        MOMENTS,
        rename(f"exp_avg/{POSITIONS}", f"velocity/{POSITIONS}"),
        "'velocity/wpe.weight' is no moment",
    ),
}

#: Then it is no one file's fault, and the line names the parameter.
MISSING_TENSORS: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "a whole parameter": (WEIGHTS, lambda tensors: tensors.pop(POSITIONS), "weight of wpe.weight are missing, from 0"),
    "a moment": (MOMENTS, lambda tensors: tensors.pop(f"exp_avg/{POSITIONS}"), "exp_avg of wpe.weight are missing"),
    "the first elements": (WEIGHTS, split_at((1, N)), "weight of wpe.weight are missing, from 0 on"),
    "elements between": (WEIGHTS, split_at((0, 100), (120, N)), "weight of wpe.weight are missing, from 100 on"),
    "the last element": (WEIGHTS, split_at((0, N - 1)), "weight of wpe.weight are missing, from 251 on"),
}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to copy: what is done to the copies is what takes time here, not training and saving."""
    run_folder = tmp_path_factory.mktemp("run")
    config = tiny_config()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("DS_ACCELERATOR", "cpu")):
            environment.setenv(name, value)
        with join_world(config.run) as world:
            trained = make_backend(world, seed=1)
            train_steps(trained, 1)
            return save_checkpoint(run_folder, state_of(trained, 3), dump_config(config), trained, world, 1)


@pytest.fixture
def folder(untouched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untouched, tmp_path / "checkpoints" / untouched.name))


def expect_refused(folder: Path, world: World, place: Path, message: str, *, weights_too: bool = True) -> None:
    """By verification, by loading a training state, and by loading weights; nothing is changed by it."""
    found = find_damage(folder)
    assert found is not None
    target = make_backend(world, seed=2)
    with unchanged(target):
        with pytest.raises(CheckpointError) as loading:
            load_training_state(folder, target)
        lines = [found, str(loading.value)]
        if weights_too:
            with pytest.raises(CheckpointError) as loading:
                load_weights(folder, {name: p.detach() for name, p in target.model.named_parameters()})
            lines.append(str(loading.value))
    for line in lines:
        assert line.startswith(f"{place}: ") and re.search(message, line) and "\n" not in line, line


class TestTensors:
    def test_a_change_that_keeps_to_the_rules_is_accepted(self, save: Save, backend: DdpBackend, world: World) -> None:
        """What the tests below do is otherwise right: sealed, hashed, and readable."""
        folder = save()
        edit_tensors(folder, WEIGHTS, split_at((0, 100), (100, N)))
        assert find_damage(folder) is None
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        assert_same(contents(other), contents(backend))

    @pytest.mark.parametrize("what", list(WRONG_TENSORS))
    def test_what_no_rank_would_write_is_refused(self, folder: Path, world: World, what: str) -> None:
        file, change, message = WRONG_TENSORS[what]
        edit_tensors(folder, file, change)
        expect_refused(folder, world, folder / file, message)

    @pytest.mark.parametrize("what", list(MISSING_TENSORS))
    def test_missing_elements_are_refused(self, folder: Path, world: World, what: str) -> None:
        file, change, message = MISSING_TENSORS[what]
        edit_tensors(folder, file, change)
        expect_refused(folder, world, folder, message)

    @pytest.mark.parametrize("file", [WEIGHTS, MOMENTS])
    def test_a_file_that_is_not_named_is_missing(self, folder: Path, world: World, file: str) -> None:
        edit_manifest(folder, lambda manifest: manifest["files"].pop(file))
        expect_refused(folder, world, folder, "elements of .* are missing")

    def test_the_same_elements_of_two_ranks_are_refused(self, folder: Path, world: World) -> None:
        second = folder / pieces_file(1, "weights")
        second.write_bytes((folder / WEIGHTS).read_bytes())
        seal(folder)
        expect_refused(folder, world, second, "overlaps another piece")

    @pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{"])
    def test_what_is_no_safetensors_is_refused(self, folder: Path, world: World, content: bytes) -> None:
        (folder / WEIGHTS).write_bytes(content)
        seal(folder)
        expect_refused(folder, world, folder / WEIGHTS, "cannot be read")


class TestManifest:
    OUTSIDE = ["../outside.safetensors", "/etc/passwd", "sub/file", f"./{WEIGHTS}", f"sub/../{WEIGHTS}", "..", "."]
    NO_FILE_OF_OURS = ["", "model.pt", "rank_0_weights.safetensors", f"{WEIGHTS}.bak", "rank_00000_loss.safetensors"]

    @pytest.mark.parametrize("name", [*OUTSIDE, *NO_FILE_OF_OURS], ids=repr)
    def test_a_file_that_is_no_checkpoints_is_refused(self, folder: Path, world: World, name: str) -> None:
        outside = folder.parent / "outside.safetensors"
        outside.write_bytes((folder / WEIGHTS).read_bytes())
        edit_manifest(folder, lambda manifest: manifest["files"].update({name: manifest["files"].pop(WEIGHTS)}))
        expect_refused(folder, world, folder / MANIFEST, re.escape(repr(name)))

    @pytest.mark.parametrize(
        "entry", [None, 7, [], {}, {"bytes": 1}, {"sha256": "0" * 64}], ids=lambda value: json.dumps(value)[:16]
    )
    def test_a_file_without_size_or_hash_is_refused(self, folder: Path, world: World, entry: Any) -> None:
        edit_manifest(folder, lambda manifest: manifest["files"].update({WEIGHTS: entry}))
        expect_refused(folder, world, folder / MANIFEST, "malformed")

    @pytest.mark.parametrize(
        ("key", "value"),
        [("bytes", "12"), ("bytes", 1.5), ("bytes", None), ("sha256", 3), ("sha256", "0" * 63), ("sha256", "G" * 64)],
    )
    def test_a_size_or_hash_that_is_none_is_refused(self, folder: Path, world: World, key: str, value: Any) -> None:
        edit_manifest(folder, lambda manifest: manifest["files"][WEIGHTS].update({key: value}))
        expect_refused(folder, world, folder / MANIFEST, "malformed")

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
    def test_a_shape_that_is_none_is_refused(self, folder: Path, world: World, shape: Any) -> None:
        edit_manifest(folder, lambda manifest: manifest["parameters"].update({POSITIONS: shape}))
        found = find_damage(folder)
        assert found is not None and found.startswith(f"{folder / MANIFEST}: malformed") and "\n" not in found
        expect_refused(folder, world, folder / MANIFEST, "malformed")

    def test_a_state_that_is_not_named_is_refused(self, folder: Path, world: World) -> None:
        edit_manifest(folder, lambda manifest: manifest["files"].pop(STATE))
        expect_refused(folder, world, folder / MANIFEST, "does not name state.json")

    def test_nesting_without_end_is_refused(self, folder: Path, world: World) -> None:
        (folder / MANIFEST).write_text("[" * 100_000)
        expect_refused(folder, world, folder / MANIFEST, "cannot be read")


#: Key of ``state.json``, and a value that it cannot have.
COUNTS = ("step", "samples", "tokens", "updates", "seed", "loss_scale_good_steps")
WRONG_STATES: list[tuple[str, Any]] = [
    *[(key, value) for key in COUNTS for value in ("3", None, 3.5, True)],
    *[("loss_scale", value) for value in ("1.0", True)],
    ("data_sha256", 7),
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


class TestState:
    @pytest.mark.parametrize(("key", "value"), WRONG_STATES, ids=lambda part: json.dumps(part)[:32])
    def test_a_count_that_is_none_is_refused(self, folder: Path, world: World, key: str, value: Any) -> None:
        edit_state(folder, lambda state: state.update({key: value}))
        expect_refused(folder, world, folder / STATE, f"malformed .*{key}", weights_too=False)

    @pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE, ids=lambda part: json.dumps(part)[:32])
    def test_a_count_that_cannot_be_is_refused(self, folder: Path, world: World, key: str, value: Any) -> None:
        edit_state(folder, lambda state: state.update({key: value}))
        expect_refused(folder, world, folder / STATE, f"malformed .*{key}", weights_too=False)

    @pytest.mark.parametrize("key", [*COUNTS, "loss_scale", "world_size"])
    def test_a_count_that_is_missing_is_refused(self, folder: Path, world: World, key: str) -> None:
        edit_state(folder, lambda state: state.pop(key))
        expect_refused(folder, world, folder / STATE, f"malformed .*{key}", weights_too=False)

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "3", "null", "[" * 100_000],
        ids=lambda text: text[:4] or "nothing",
    )
    def test_what_is_no_object_is_refused(self, folder: Path, world: World, content: str) -> None:
        (folder / STATE).write_text(content)
        seal(folder)
        expect_refused(folder, world, folder / STATE, "", weights_too=False)

    def test_a_state_from_before_there_was_a_guard_is_read(self, folder: Path, world: World) -> None:
        edit_state(folder, lambda state: [state.pop(key) for key in ("guard", "data_sha256")])
        assert find_damage(folder) is None
        assert load_training_state(folder, make_backend(world, seed=2)).data_sha256 is None

"""Pieces of any sharding load into any other, and malformed tensor files with correct hashes are rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.backends import Backend, Fragment
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint.background import fragments_to_write, slice_fragment
from pipeline.checkpoint.layout import GROUPS, group_of, tensor_file
from pipeline.checkpoint.loading import load_training_state, load_weights
from pipeline.checkpoint.pieces import piece_key
from pipeline.checkpoint.verification import find_damage
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.model.gpt2 import build_model
from tests.pipeline.checkpoint.conftest import (
    MOMENTS,
    POSITIONS,
    WEIGHTS,
    Save,
    assert_rejected,
    contents,
    edit_manifest,
    edit_tensors,
    make_backend,
    seal,
    updates_of,
)
from tests.pipeline.conftest import TINY_MODEL, assert_same, tiny_model_config

POSITIONS_SHAPE = (TINY_MODEL["context_length"], TINY_MODEL["n_embd"])
N = TINY_MODEL["context_length"] * TINY_MODEL["n_embd"]


def cut_into_ranges(fragments: list[Fragment], length: int) -> list[Fragment]:
    """Return the same state in ranges of ``length`` elements, which do not end at rows."""
    return [
        slice_fragment(fragment, low, min(low + length, fragment.weight.numel()))
        for fragment in fragments
        for low in range(0, fragment.weight.numel(), length)
    ]


class ShardedBackend(Backend):
    """Holds every second range of another backend's elements, like one of two ranks under ZeRO."""

    accumulate = _update = describe = None  # type: ignore[assignment]

    def __init__(self, whole: DdpBackend, length: int, rank: int) -> None:
        vars(self).update(vars(whole), ranks_per_copy=2)
        self.whole, self.mine = whole, cut_into_ranges(whole.fragments(), length)[rank::2]

    def fragments(self) -> list[Fragment]:
        return self.mine

    def state_was_loaded(self, updates: int) -> None:
        self.whole.state_was_loaded(updates)


class TestSharding:
    """Pieces of sharded ranks load into a whole model, and the other way round."""

    @staticmethod
    def rewrite(folder: Path, backend: Backend, fragments_of_rank: list[list[Fragment]]) -> None:
        """Rewrite a checkpoint as several ranks would have written it."""
        for rank, fragments in enumerate(fragments_of_rank):
            groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
            for fragment in fragments:
                shape, n = backend.parameter_shapes[fragment.name], fragment.weight.numel()
                elements = None if n == shape.numel() else (fragment.start, fragment.start + n)
                for kind, tensor in fragment.tensors.items():
                    stored = tensor.view(shape if elements is None else (n,)).clone()
                    groups[group_of(kind)][piece_key(kind, fragment.name, elements)] = stored
            for name, tensors in groups.items():
                save_file(tensors, folder / tensor_file(rank, name))
        seal(folder)

    @pytest.mark.parametrize("length", [1000, 64, 33])
    def test_pieces_load_into_a_whole_model(self, save: Save, backend: DdpBackend, world: World, length: int) -> None:
        folder = save()
        pieces = cut_into_ranges(backend.fragments(), length)
        self.rewrite(folder, backend, [pieces[0::2], pieces[1::2]])
        assert find_damage(folder) is None
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        assert_same(contents(other), contents(backend))
        model = build_model(tiny_model_config(), 9)
        load_weights(folder, {name: parameter.detach() for name, parameter in model.named_parameters()})
        for name, parameter in backend.model.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name

    @pytest.mark.parametrize(("stored_length", "loaded_length"), [(None, 50), (64, 50), (50, 64), (33, 1000)])
    def test_pieces_of_one_sharding_load_into_another(
        self, save: Save, backend: DdpBackend, world: World, stored_length: int | None, loaded_length: int
    ) -> None:
        folder = save()
        if stored_length:
            pieces = cut_into_ranges(backend.fragments(), stored_length)
            self.rewrite(folder, backend, [pieces[0::2], pieces[1::2]])
        other = make_backend(world, seed=2)
        first_half = ShardedBackend(other, loaded_length, rank=0)
        load_training_state(folder, first_half)
        assert any(
            not torch.equal(a, b) for a, b in zip(contents(other).values(), contents(backend).values(), strict=True)
        )
        load_training_state(folder, ShardedBackend(other, loaded_length, rank=1))
        assert_same(contents(other), contents(backend))
        assert updates_of(other) == 3

    def test_with_the_same_sharding_a_rank_reads_only_its_own_files(
        self, save: Save, backend: DdpBackend, world: World
    ) -> None:
        folder = save()
        pieces = cut_into_ranges(backend.fragments(), 64)
        self.rewrite(folder, backend, [pieces[0::2], pieces[1::2]])
        other = make_backend(world, seed=2)
        for rank in (0, 1):
            hidden = [folder / tensor_file(1 - rank, group) for group in GROUPS]
            for path in hidden:
                path.rename(path.with_suffix(".hidden"))
            load_training_state(folder, ShardedBackend(other, 64, rank), rank)
            with pytest.raises(CheckpointError, match=f"rank_0000{1 - rank}"):
                load_training_state(folder, ShardedBackend(other, 50, rank), rank)
            for path in hidden:
                path.with_suffix(".hidden").rename(path)
        assert_same(contents(other), contents(backend))

    @pytest.mark.parametrize("ranks", [2, 3, 50])
    def test_replicated_ranks_share_the_writing(
        self, save: Save, backend: DdpBackend, world: World, ranks: int
    ) -> None:
        folder = save()
        shares = [fragments_to_write(backend, replace(world, rank=rank, size=ranks)) for rank in range(ranks)]
        sizes = [sum(fragment.weight.numel() for fragment in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        self.rewrite(folder, backend, shares)
        assert find_damage(folder) is None
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        assert_same(contents(other), contents(backend))

    def test_copies_of_shards_share_the_writing(self, save: Save, backend: DdpBackend, world: World) -> None:
        """Six ranks in three shard groups of two: each element is written once."""
        folder = save()
        halves = [ShardedBackend(backend, 64, rank) for rank in range(2)]
        shares = [fragments_to_write(halves[rank % 2], replace(world, rank=rank, size=6)) for rank in range(6)]
        self.rewrite(folder, backend, shares)
        assert find_damage(folder) is None
        for half in range(2):
            sizes = [sum(fragment.weight.numel() for fragment in share) for share in shares[half::2]]
            assert max(sizes) - min(sizes) <= 1
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        assert_same(contents(other), contents(backend))

    def test_sharded_ranks_write_all_that_they_hold(self, backend: DdpBackend, world: World) -> None:
        sharded = ShardedBackend(backend, 64, rank=1)
        assert fragments_to_write(sharded, replace(world, rank=1, size=2)) == sharded.fragments()

    def test_a_missing_piece_is_an_error(self, save: Save, backend: DdpBackend, world: World) -> None:
        folder = save()
        pieces = cut_into_ranges(backend.fragments(), 64)
        self.rewrite(folder, backend, [pieces[0::2], pieces[1:-2:2]])
        with pytest.raises(CheckpointError, match="elements of .* are missing"):
            load_training_state(folder, make_backend(world, seed=2))


Tensors = dict[str, Tensor]


def split_at(*ranges: tuple[int, int]) -> Callable[[Tensors], None]:
    """Store the position embedding as these ranges of its elements, repeated if it is too short."""

    def change(tensors: Tensors) -> None:
        elements = tensors.pop(POSITIONS).flatten().repeat(2)
        for start, stop in ranges:
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


#: Defect -> the file, the change that causes it, and what the message says after the file.
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
    "a range beyond the end": (WEIGHTS, split_at((0, N + 1)), r"wpe.weight\[0:253\] has shape \[253\]"),
    "a range after the end": (WEIGHTS, split_at((0, N), (N, N + 3)), r"wpe.weight\[252:255\] has shape \[3\]"),
    "an empty range": (WEIGHTS, split_at((0, N), (5, 5)), r"wpe.weight\[5:5\] has shape \[0\]"),
    "a backward range": (WEIGHTS, split_at((0, N), (7, 3)), r"wpe.weight\[7:3\] has shape"),
    "a range shorter than its key says": (
        WEIGHTS,
        lambda tensors: tensors.update({f"{POSITIONS}[0:{N}]": tensors.pop(POSITIONS).flatten()[:-1]}),
        r"wpe.weight\[0:252\] has shape \[251\], expected \[252\]",
    ),
    "a range in rows": (
        WEIGHTS,
        rename(POSITIONS, f"{POSITIONS}[0:{N}]"),
        r"wpe.weight\[0:252\] has shape \[12, 21\], expected \[252\]",
    ),
    "a range with endless numbers": (
        WEIGHTS,
        rename(POSITIONS, f"{POSITIONS}[0:{'9' * 5000}]"),
        "integer string|has shape",
    ),
    "pieces overlap": (WEIGHTS, split_at((0, 10), (9, N)), r"wpe.weight\[9:252\] overlaps another piece"),
    "a piece inside another": (WEIGHTS, split_at((0, N), (3, 5)), r"wpe.weight\[3:5\] overlaps another piece"),
    "a moment without its kind": (MOMENTS, rename(f"exp_avg/{POSITIONS}", POSITIONS), "'wpe.weight' is not a moment"),
    "a weight among the moments": (
        MOMENTS,
        rename(f"exp_avg/{POSITIONS}", f"weight/{POSITIONS}"),
        "'weight/wpe.weight' is not a moment",
    ),
    "a moment of another kind": (
        MOMENTS,
        rename(f"exp_avg/{POSITIONS}", f"velocity/{POSITIONS}"),
        "'velocity/wpe.weight' is not a moment",
    ),
}

#: The same for missing elements, where the message names the parameter instead of a file.
MISSING_TENSORS: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "a whole parameter": (WEIGHTS, lambda tensors: tensors.pop(POSITIONS), "weight of wpe.weight are missing, from 0"),
    "a moment": (MOMENTS, lambda tensors: tensors.pop(f"exp_avg/{POSITIONS}"), "exp_avg of wpe.weight are missing"),
    "the first elements": (WEIGHTS, split_at((1, N)), "weight of wpe.weight are missing, from 0 on"),
    "elements between": (WEIGHTS, split_at((0, 100), (120, N)), "weight of wpe.weight are missing, from 100 on"),
    "the last element": (WEIGHTS, split_at((0, N - 1)), "weight of wpe.weight are missing, from 251 on"),
}


class TestTensors:
    def test_a_valid_change_is_accepted(self, save: Save, backend: DdpBackend, world: World) -> None:
        """The changes of the tests below are rejected for no other reason: hashes and formats are right."""
        folder = save()
        edit_tensors(folder, WEIGHTS, split_at((0, 100), (100, N)))
        assert find_damage(folder) is None
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        assert_same(contents(other), contents(backend))

    @pytest.mark.parametrize("what", list(WRONG_TENSORS))
    def test_a_wrong_tensor_is_rejected(self, folder: Path, world: World, what: str) -> None:
        file, change, message = WRONG_TENSORS[what]
        edit_tensors(folder, file, change)
        assert_rejected(folder, world, folder / file, message, weights_too=file != MOMENTS)

    @pytest.mark.parametrize("what", list(MISSING_TENSORS))
    def test_missing_elements_are_rejected(self, folder: Path, world: World, what: str) -> None:
        file, change, message = MISSING_TENSORS[what]
        edit_tensors(folder, file, change)
        assert_rejected(folder, world, folder, message, weights_too=file != MOMENTS)

    @pytest.mark.parametrize("file", [WEIGHTS, MOMENTS])
    def test_a_file_that_is_not_named_is_missing(self, folder: Path, world: World, file: str) -> None:
        edit_manifest(folder, lambda manifest: manifest["files"].pop(file))
        assert_rejected(folder, world, folder, "elements of .* are missing", weights_too=file != MOMENTS)

    def test_the_same_elements_from_two_ranks_are_rejected(self, folder: Path, world: World) -> None:
        second = folder / tensor_file(1, "weights")
        second.write_bytes((folder / WEIGHTS).read_bytes())
        seal(folder)
        assert_rejected(folder, world, second, "overlaps another piece")

    @pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{"])
    def test_a_file_in_another_format_is_rejected(self, folder: Path, world: World, content: bytes) -> None:
        (folder / WEIGHTS).write_bytes(content)
        seal(folder)
        assert_rejected(folder, world, folder / WEIGHTS, "cannot be read" if content else r"is empty \(0 bytes\)")

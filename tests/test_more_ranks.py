"""With three and four ranks, and with groups of ranks, every backend has the curve and the checkpoints of one rank.

Each start of the ranks trains many cases (``tests/support/train_backends.py``), because a start takes seconds.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.layout import checkpoint_folder
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.pieces import index_pieces
from pipeline.checkpoint.verification import find_damage
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.runs import BACKENDS, REPOSITORY, run_ranks
from tests.support.train_backends import SAVED_AT, STEPS, Case, Result, read_results

pytest.importorskip("deepspeed")

SCRIPT = REPOSITORY / "tests" / "support" / "train_backends.py"
TOLERANCE = LOSS_TOLERANCE["fp32"]  # of losses and, here, also of relative differences in gradient norm

#: The kinds of training. Each kind has its own reference on one rank.
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"sections": {"optimizer": {"name": "muon"}}},
    "dropout": {"sections": {"model": {"dropout": 0.1}}},
    "skipped step": {"bad_step": 2},
    "gathered weights stay": {"sections": {"backend.fsdp": {"reshard_after_forward": False}}},
}

#: FSDP2 with groups of two ranks, of one rank, and of all ranks; ZeRO-3 with secondary shards on groups of two ranks.
GROUPED = ("fsdp/2", "fsdp/1", "fsdp/4", "zero3/2")

#: The ranks send and sum gradients in bf16.
BF16_REDUCTION = {"sections": {"backend": {"reduce_dtype": "bf16"}}}

Train = Callable[[int, Iterable[Case]], dict[str, Result]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("more_ranks")


@pytest.fixture(scope="module")
def train(folder: Path) -> Train:
    """Return a function that trains cases on a number of ranks."""

    def run(ranks: int, cases: Iterable[Case]) -> dict[str, Result]:
        # DeepSpeed keeps the groups of hpZ until the process ends, so cases with these groups come last.
        ordered = sorted(cases, key=lambda case: case.config == "zero3/2")
        (folder / "cases.json").write_text(json.dumps([asdict(case) for case in ordered]))
        result = run_ranks(ranks, SCRIPT, [str(folder / "cases.json"), str(folder / "results.json")])
        assert result.returncode == 0, result.stdout + result.stderr
        return read_results(folder / "results.json")

    return run


def run_folder(folder: Path, ranks: int, config: str) -> Path:
    return folder / f"{ranks}-{config.replace('/', '_')}"


@pytest.fixture(scope="module")
def one(train: Train, folder: Path) -> dict[str, Result]:
    """The references: every kind of training under DDP in one process, and a checkpoint of the first kind."""
    cases = [Case(kind, "ddp", **changes) for kind, changes in KINDS.items()]
    cases[0] = Case("adamw", "ddp", save_to=str(run_folder(folder, 1, "ddp")))
    return train(1, cases)


@pytest.fixture(scope="module")
def four(train: Train, folder: Path, one: dict[str, Result]) -> dict[str, Result]:
    """Every backend on four ranks, from scratch with a checkpoint, and from the checkpoint of one rank."""
    del one  # has written the checkpoint
    start = str(checkpoint_folder(run_folder(folder, 1, "ddp"), SAVED_AT))
    scratch = [Case(name, name, save_to=str(run_folder(folder, 4, name))) for name in (*BACKENDS, *GROUPED)]
    kinds = [
        Case(f"{name}, {kind}", name, **changes)
        for kind, changes in list(KINDS.items())[1:]
        for name in ("fsdp/2", "zero3/2")
        if (kind, name) != ("gathered weights stay", "zero3/2")
    ]
    more = [Case("zero2, muon", "zero2", **KINDS["muon"]), Case("fsdp/1, muon", "fsdp/1", **KINDS["muon"])]
    continued = [Case(f"{name}, continued", name, start=start) for name in ("fsdp", "fsdp/2", "zero1", "zero3/2")]
    return train(4, [*scratch, *kinds, *more, *continued, *reducing_in_bf16(("ddp", "zero3", "fsdp/2", "fsdp/1"))])


@pytest.fixture(scope="module")
def three(train: Train, folder: Path, four: dict[str, Result]) -> dict[str, Result]:
    """Every backend on three ranks, by which no tensor divides, from scratch and from checkpoints of four ranks.

    From scratch, the loss is computed in blocks of the vocabulary. Every second backend keeps their logits.
    """
    del four
    ways = itertools.cycle((True, "kept"))
    cases = [Case(name, name, {"run": {"loss_in_blocks": next(ways)}}) for name in BACKENDS]
    pairs = (("fsdp/2", "fsdp"), ("fsdp/2", "zero3"), ("zero3/2", "ddp"))
    cases += [Case(f"{before} -> {name}", name, start=saved(folder, before)) for before, name in pairs]
    return train(3, cases)


@pytest.fixture(scope="module")
def two(train: Train, folder: Path, four: dict[str, Result]) -> dict[str, Result]:
    """Backends on two ranks that continue from checkpoints of four ranks."""
    del four
    pairs = (("fsdp/2", "fsdp"), ("zero0", "fsdp/1"), ("fsdp/1", "zero1"), ("zero1", "fsdp"), ("zero3", "zero2"))
    pairs += (("fsdp", "zero3"), ("zero2", "zero0"), ("zero3/2", "zero3/2"))
    continued = [Case(f"{before} -> {name}", name, start=saved(folder, before)) for before, name in pairs]
    return train(2, [Case("zero3", "zero3"), *continued, *reducing_in_bf16(BACKENDS)])


def reducing_in_bf16(configs: Iterable[str]) -> list[Case]:
    return [Case(f"{config} in bf16", config, **BF16_REDUCTION) for config in configs]


def saved(folder: Path, config: str) -> str:
    """Return the checkpoint that four ranks have written."""
    return str(checkpoint_folder(run_folder(folder, 4, config), SAVED_AT))


def assert_agrees(name: str, found: Result, reference: Result) -> None:
    """Compare the last steps of ``reference`` with ``found``, which may have continued from a checkpoint."""
    steps = len(found.losses)
    for loss, expected in zip(found.losses, reference.losses[-steps:], strict=True):
        assert abs(loss - expected) <= TOLERANCE, name
    for norm, expected in zip(found.grad_norms, reference.grad_norms[-steps:], strict=True):
        assert math.isfinite(norm) == math.isfinite(expected), name
        assert not math.isfinite(norm) or abs(norm - expected) <= TOLERANCE * expected, name
    assert found.updates == reference.updates, name


def test_the_references_clip_and_differ(one: dict[str, Result]) -> None:
    """Without this, the comparisons would prove little."""
    reference = one["adamw"]
    assert min(reference.grad_norms) > 0.5, "clipping is active"
    for kind in ("muon", "dropout", "skipped step"):
        differences = [abs(a - b) for a, b in zip(one[kind].losses, reference.losses, strict=True)]
        assert max(differences) > 1e-3, kind
    assert one["skipped step"].updates == STEPS - 1


@pytest.mark.parametrize("name", [*BACKENDS, *GROUPED])
def test_four_ranks_have_the_curve_of_one(name: str, one: dict[str, Result], four: dict[str, Result]) -> None:
    assert_agrees(name, four[name], one["adamw"])


def test_reductions_in_bf16_keep_the_curve(
    one: dict[str, Result], two: dict[str, Result], four: dict[str, Result]
) -> None:
    """On two ranks, the backends that reduce once per step round the same sums to bf16, so they agree as in fp32."""

    def difference(a: Result, b: Result) -> float:
        return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))

    for results, cases in ((two, 6), (four, 4)):
        reduced = [result for name, result in results.items() if name.endswith(" in bf16")]
        assert len(reduced) == cases
        for result in reduced:
            assert TOLERANCE < difference(result, one["adamw"]) <= LOSS_TOLERANCE["bf16"]
    for name, other in (("fsdp", "ddp"), ("zero0", "ddp"), ("zero1", "ddp"), ("zero3", "zero2")):
        assert difference(two[f"{name} in bf16"], two[f"{other} in bf16"]) <= TOLERANCE, name


@pytest.mark.parametrize("name", BACKENDS)
def test_three_ranks_have_the_curve_of_one(name: str, one: dict[str, Result], three: dict[str, Result]) -> None:
    assert_agrees(name, three[name], one["adamw"])


def test_groups_keep_the_curve_in_every_kind_of_training(one: dict[str, Result], four: dict[str, Result]) -> None:
    names = [name for name in four if name.partition(", ")[2] in KINDS]
    assert len(names) == 9
    for name in names:
        assert_agrees(name, four[name], one[name.partition(", ")[2]])


def test_checkpoints_move_between_numbers_of_ranks_and_groups(
    one: dict[str, Result], two: dict[str, Result], three: dict[str, Result], four: dict[str, Result]
) -> None:
    """From one rank to four with and without groups, from 2x2 to three and two ranks, and from four ranks to two."""
    every = [item for results in (two, three, four) for item in results.items()]
    continued = [(name, result) for name, result in every if " -> " in name or "continued" in name]
    assert len(continued) == 15
    for name, result in continued:
        assert len(result.losses) == STEPS - SAVED_AT, name
        assert_agrees(name, result, one["adamw"])


def test_a_checkpoint_of_groups_moves_to_one_rank(
    train: Train, folder: Path, one: dict[str, Result], four: dict[str, Result]
) -> None:
    del four
    names = ("fsdp/2", "zero3/2")
    results = train(1, [Case(name, "ddp", start=saved(folder, name)) for name in names])
    for name in names:
        assert_agrees(name, results[name], one["adamw"])


def test_a_return_to_a_checkpoint_repeats_the_steps_bit_for_bit(
    one: dict[str, Result], four: dict[str, Result]
) -> None:
    """The return follows a validation, after which FSDP2 and hpZ still have gathered weights or secondary shards."""
    for name, result in {**one, **four}.items():
        if result.again:
            assert result.again == result.losses[SAVED_AT:], name
            validation = [abs(a - b) for a, b in zip(result.validation, one["adamw"].validation, strict=True)]
            assert max(validation) <= 1e-4, name
    assert abs(one["adamw"].validation[0] - one["adamw"].validation[1]) > 1e-2, "stale weights would be noticed"


@pytest.mark.parametrize(("name", "group"), [("fsdp/2", 2), ("fsdp/1", 1), ("fsdp/2, muon", 2), ("fsdp/1, muon", 1)])
def test_copies_stay_equal_bit_for_bit(name: str, group: int, four: dict[str, Result]) -> None:
    for rank, digests in enumerate(four[name].digests):
        assert digests == four[name].digests[rank % group], rank
    if group == 2:
        assert four[name].digests[0] != four[name].digests[1]


@pytest.mark.parametrize("name", [*BACKENDS, *GROUPED])
def test_four_ranks_write_each_element_once(name: str, folder: Path, four: dict[str, Result]) -> None:
    """Each rank writes about the same number of bytes, also if several ranks hold the same elements."""
    del four
    checkpoint = Path(saved(folder, name))
    assert find_damage(checkpoint) is None
    manifest = read_manifest(checkpoint)
    index_pieces(checkpoint, manifest)  # raises if an element is missing or stored twice
    elements = sum(math.prod(shape) for shape in manifest.parameters.values())
    sizes = [entry.bytes for file, entry in manifest.files.items() if file.endswith("_weights.safetensors")]
    assert len(sizes) == 4
    assert sum(sizes) < 4 * elements + 4 * 4000, "the headers of four files"
    assert max(sizes) < 1.5 * sum(sizes) / 4

"""Check what can be checked of MPS without an Apple GPU: refusals, and that torch has the operators that runs use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.backends.optimizer import build_adamw
from pipeline.data.loader import MicroBatch
from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2, ScoringBatch
from pipeline.model.key_value_cache import KeyValueCache
from pipeline.model.output_layer import IGNORE_INDEX
from pipeline.model.precision import AutocastModel
from pipeline.training import run
from tests.pipeline.conftest import random_tokens, randomised_model, tiny_config

CPU = torch.device("cpu")

#: torch's kernels of attention for CPUs. On MPS, torch chooses among other operators.
ATTENTION_ON_CPU = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the names and overloads of all operators, and the dtypes of their results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":  # the others are marks of the profiler
            self.names.add(func.name().removeprefix("aten::"))
        self.dtypes.update(leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


@cache
def declarations() -> dict[str, str]:
    """Return the declaration of every operator in torch's ``native_functions.yaml``, by name and overload."""
    assert torchgen.__file__ is not None
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    blocks = re.split(r"^- func: ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {block.partition("(")[0]: block for block in blocks}


def exists_on_mps(name: str) -> bool:
    """Return whether torch registers the operator for MPS, or composes it from other operators."""
    declaration = declarations()[name]
    if delegate := re.search(r"structured_delegate: (\S+)", declaration):
        return exists_on_mps(delegate[1])
    return "dispatch:" not in declaration or re.search(r"MPS|Composite", declaration) is not None


def test_torch_tells_which_operators_mps_has() -> None:
    assert exists_on_mps("_cummax_helper") and exists_on_mps("linalg_vector_norm")
    assert not exists_on_mps("_fused_sdp_choice") and not exists_on_mps("_flash_attention_forward")


def train_step(model: GPT2) -> None:
    """Run a step with loss mask, dropout, clipping and AdamW."""
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 3] = False
    tokens, targets = MicroBatch(0, random_tokens(2, 13).to(torch.uint16), mask).to(CPU)
    assert (targets == IGNORE_INDEX).any()
    AutocastModel(model, "amp_bf16", CPU)(tokens, targets, method="loss").backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in gradients]).sum().sqrt()
    torch._foreach_mul_(gradients, torch.clamp(1.0 / norm, max=1.0))
    build_adamw(model.parameters(), tiny_config().optimizer, CPU).step()


@torch.no_grad()
def evaluate(model: GPT2) -> None:
    """Score a packed batch, and generate two tokens after texts of different lengths."""
    tokens = random_tokens(2, 6)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].expand(2, 1, 6, 6)
    positions = torch.arange(6).expand(2, 6)
    model.score(ScoringBatch(tokens, tokens[0], torch.arange(6), positions, visible))
    cache = KeyValueCache(model.config, 2, 12, device=CPU, dtype=torch.float32)
    lengths = torch.tensor([[6], [4]])
    model.prefill(tokens, lengths, cache)
    model.decode(tokens[:, :1], lengths, 7, cache).float().topk(5)


@pytest.fixture
def used() -> Iterator[Operators]:
    model = randomised_model(tiny_config(model={"dropout": 0.1, "reset_positions_at": 3}).model)
    with Operators() as operators:
        train_step(model.train())
        evaluate(model.eval())
    yield operators


def test_torch_has_every_operator_of_training_evaluation_and_generation_for_mps(used: Operators) -> None:
    assert {"_fused_adamw_", "cummax", "nll_loss_forward", "linalg_vector_norm"} <= used.names
    names = {name for name in used.names if name.partition(".")[0] not in ATTENTION_ON_CPU}
    assert sorted(name for name in names if not exists_on_mps(name)) == []


def test_nothing_that_mps_computes_is_fp64(used: Operators) -> None:
    assert torch.float32 in used.dtypes
    assert torch.float64 not in used.dtypes


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"backend": {"name": "fsdp"}}, "backend.name: fsdp does not run on mps; use ddp"),
        (
            {"model": {"dropout": 0.1, "activation_checkpointing": True}},
            "other dropout masks when it recomputes a block",
        ),
    ],
)
def test_what_cannot_work_on_mps_is_refused(sections: dict[str, dict[str, Any]], message: str) -> None:
    world = World(0, 1, 0, torch.device("mps"))
    with pytest.raises(run.ConfigError, match=message):
        run._build_trainer(tiny_config(**sections), world, run.ExitStack(), run.sha256_of_file)

"""The loss in blocks of the vocabulary has the values and gradients of the loss from all logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model import blocked_loss
from pipeline.model.blocked_loss import block_columns, blocked_cross_entropy, bytes_of_a_block, compute_gradients
from pipeline.model.gpt2 import build_model
from pipeline.model.output_layer import IGNORE_INDEX, padded_vocab_size
from pipeline.model.precision import replicated_compute
from pipeline.planning.activations import LiveBytes
from tests.pipeline.conftest import VOCAB_SIZE, random_tokens, tiny_model_config

ROWS, WIDTH, PADDED = 9, 21, padded_vocab_size(VOCAB_SIZE)
FACTORS = torch.linspace(-1.0, 2.0, ROWS)  # the gradients of the losses

Losses = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide 128 columns into five blocks of 24 and one of 8. One has words and padding, two have only padding."""
    monkeypatch.setattr(blocked_loss, "BLOCK_COLUMNS", 24)
    monkeypatch.setattr(blocked_loss, "_compiled", lambda step: step)
    assert block_columns(PADDED) == 24


@pytest.fixture
def targets() -> Tensor:
    targets = random_tokens(ROWS)
    targets[2] = IGNORE_INDEX
    targets[3], targets[4], targets[5] = 0, 24, VOCAB_SIZE - 1
    return targets


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return hidden states and a weight that give logits between about -20 and 20."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(rows, WIDTH, generator=generator) for rows in (ROWS, PADDED))
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def in_blocks(hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool = False) -> Tensor:
    return blocked_cross_entropy(hidden, weight, targets, VOCAB_SIZE, IGNORE_INDEX, keep=keep)


def at_once(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t())[:, :VOCAB_SIZE]
    return F.cross_entropy(logits.double(), targets, ignore_index=IGNORE_INDEX, reduction="none").float()


def losses_and_gradients(losses_of: Losses, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight = inputs(dtype)
    losses = losses_of(hidden, weight, targets)
    return losses.detach(), *torch.autograd.grad(losses, (hidden, weight), FACTORS)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_losses_and_gradients_are_those_of_all_logits(
    targets: Tensor, dtype: torch.dtype, rtol: float, is_compiled: bool, keep: bool
) -> None:
    losses_of = partial(in_blocks, keep=keep)
    if is_compiled:
        losses_of = torch.compile(losses_of, backend="aot_eager", fullgraph=True)
    losses, grad_hidden, grad_weight = losses_and_gradients(losses_of, targets, dtype)
    expected = losses_and_gradients(at_once, targets, dtype)
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(grad_hidden, expected[1], rtol=rtol, atol=rtol)
    torch.testing.assert_close(grad_weight, expected[2], rtol=rtol, atol=rtol / 100)
    assert losses[2] == 0
    assert grad_hidden[2].count_nonzero() == 0, "a target that is not scored"
    assert grad_weight[VOCAB_SIZE:].count_nonzero() == 0, "padding"


def test_kept_logits_are_not_computed_again(monkeypatch: pytest.MonkeyPatch, targets: Tensor) -> None:
    """The forward pass has one product per block, and the backward pass has two or three."""
    products, original = [], torch.mm

    def counted(*arguments: Tensor, **options: Tensor) -> Tensor:
        products.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "mm", counted)
    counts = []
    for keep in (False, True):
        products.clear()
        losses_and_gradients(partial(in_blocks, keep=keep), targets, torch.float32)
        counts.append(len(products))
    assert counts == [4 * 6, 3 * 6]


def test_logits_that_are_not_finite_are_not_hidden(targets: Tensor) -> None:
    hidden, weight = inputs(torch.float32)
    with torch.no_grad():
        weight[30, 0] = torch.nan
    losses = in_blocks(hidden, weight, targets)
    assert losses[targets != IGNORE_INDEX].isnan().all()


def test_far_logits_neither_overflow_nor_vanish() -> None:
    """Logits are -5000 to 5000, and the largest one is in the first or in the last block of words."""
    weight = torch.zeros(PADDED, 1)
    weight[0], weight[VOCAB_SIZE - 1] = -5000.0, 5000.0
    hidden, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([VOCAB_SIZE - 1, VOCAB_SIZE - 1])
    assert in_blocks(hidden, weight, targets).tolist() == [0.0, 10_000.0]


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])
@pytest.mark.parametrize("way", [True, "kept"])
def test_a_model_has_the_same_loss_and_the_same_gradients(precision: str, way: Any) -> None:
    """The gradient of the tied weight is the sum of those of the embedding and of the output layer."""
    tokens, targets = random_tokens(2, 12), random_tokens(2, 12, seed=1)
    targets[1, 4:] = IGNORE_INDEX
    found = []
    for loss_in_blocks in (False, way):
        model = build_model(tiny_model_config(), seed=1)
        model.lm_head.loss_in_blocks = loss_in_blocks
        loss = replicated_compute(model, precision, torch.device("cpu"))(tokens, targets, method="loss")
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        assert {tensor.dtype for tensor in found[-1] if tensor is not None} == {torch.float32}
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    for whole, blocked in zip(*found, strict=True):
        torch.testing.assert_close(blocked, whole, rtol=tolerance, atol=tolerance * float(whole.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_one_block(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(blocked_loss, "BLOCK_COLUMNS", 3000)
    rows, words, padded = 200, 7990, 8000
    hidden, weight = torch.randn(rows, 1).to(dtype), torch.randn(padded, 1).to(dtype)
    most = 0

    class MostBytes(LiveBytes):
        def __torch_dispatch__(self, *arguments: object) -> object:
            nonlocal most
            result = super().__torch_dispatch__(*arguments)  # type: ignore[arg-type]
            most = max(most, self.total)
            return result

    with MostBytes():
        nothing_kept = hidden.new_empty(0)
        compute_gradients(
            torch.ones(rows), hidden, weight, random_tokens(rows), torch.ones(rows), nothing_kept, words, False
        )
    assert most == pytest.approx(bytes_of_a_block(rows, padded, dtype.itemsize), rel=0.1)

"""The loss in chunks is the loss, and its gradients are the gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import output_layer
from pipeline.output_layer import IGNORE_INDEX, OutputLayer
from tests.pipeline.conftest import VOCAB_SIZE, random_tokens


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """14 tokens are two chunks of five and a rest."""
    monkeypatch.setattr(output_layer, "CHUNK_ROWS", 5)


@pytest.fixture
def layer() -> OutputLayer:
    torch.manual_seed(0)
    return OutputLayer(21, VOCAB_SIZE)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 7, 21, generator=torch.Generator().manual_seed(1)).requires_grad_()


def targets_with_a_gap() -> Tensor:
    targets = random_tokens(2, 7)
    targets[0, 3:6] = IGNORE_INDEX
    return targets


def expected_loss(layer: OutputLayer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Over all rows at once, in fp64."""
    logits = (hidden.double() @ layer.weight.double().T)[..., :VOCAB_SIZE]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def test_loss_and_gradients(layer: OutputLayer, hidden: Tensor) -> None:
    targets = targets_with_a_gap()
    found, expected = layer(hidden, targets), expected_loss(layer, hidden, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    of_found = torch.autograd.grad(found * 0.3, (hidden, layer.weight))
    of_expected = torch.autograd.grad(expected * 0.3, (hidden, layer.weight))
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert (of_found[1][VOCAB_SIZE:] == 0).all(), "padding rows get no gradient"


def test_autocast_computes_in_bf16_and_keeps_fp32_gradients(layer: OutputLayer, hidden: Tensor) -> None:
    targets = targets_with_a_gap()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(hidden, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected_loss(layer, hidden, targets).item(), rel=1e-2)
    found.backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    reference = torch.autograd.grad(expected_loss(layer, hidden, targets), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, reference, rtol=0.05, atol=0.05)


def test_fp16_is_left_to_the_loss_scale(monkeypatch: pytest.MonkeyPatch, layer: OutputLayer, hidden: Tensor) -> None:
    monkeypatch.setattr(OutputLayer, "_loss_in_chunks", lambda *_: pytest.fail("in chunks"))
    with torch.autocast("cpu", torch.float16):
        layer(hidden, targets_with_a_gap())


def test_a_validation_keeps_nothing_for_a_backward_pass(layer: OutputLayer, hidden: Tensor) -> None:
    with torch.no_grad():
        assert not layer(hidden, targets_with_a_gap()).requires_grad
    assert layer(hidden, targets_with_a_gap()).requires_grad

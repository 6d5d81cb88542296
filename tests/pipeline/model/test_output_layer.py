"""The variants for the compiler give the same loss and gradients, also for padding and unscored targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.gpt2 import GPT2, build_model, gelu
from pipeline.model.output_layer import IGNORE_INDEX, cross_entropy, score_targets
from tests.pipeline.conftest import tiny_config

VOCABULARY, PADDED, ROWS = 50, 64, 9


def losses_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses, and the gradient of three times their sum in the logits' dtype."""
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, targets, VOCABULARY)
    (3.0 * losses.sum()).backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(ROWS, PADDED, generator=torch.Generator().manual_seed(1)) * 4


@pytest.fixture
def targets() -> Tensor:
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(2))
    targets[2] = IGNORE_INDEX
    targets[3], targets[4] = 0, VOCABULARY - 1
    return targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiling", [False, True])
def test_cross_entropy_is_that_of_torch(
    monkeypatch: pytest.MonkeyPatch, logits: Tensor, targets: Tensor, dtype: torch.dtype, compiling: bool
) -> None:
    logits = logits.to(dtype)
    expected = F.cross_entropy(logits[:, :VOCABULARY].double(), targets, ignore_index=IGNORE_INDEX, reduction="none")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    losses, _ = losses_and_gradient(logits, targets)
    torch.testing.assert_close(losses, expected.float(), rtol=1e-6, atol=1e-6)
    assert losses[2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_those_of_eager(
    monkeypatch: pytest.MonkeyPatch, logits: Tensor, targets: Tensor, dtype: torch.dtype
) -> None:
    logits = logits.to(dtype)
    _, eager = losses_and_gradient(logits, targets)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    _, compiled = losses_and_gradient(logits, targets)
    torch.testing.assert_close(compiled, eager, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert compiled[2].count_nonzero() == 0, "a target that is not scored"
    assert compiled[:, VOCABULARY:].count_nonzero() == 0, "padding"


def test_logits_that_are_not_finite_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, logits: Tensor, targets: Tensor
) -> None:
    logits[0, 0] = torch.nan
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    losses, gradient = losses_and_gradient(logits, targets)
    assert losses[0].isnan()
    assert gradient[0, :VOCABULARY].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_are_the_places_in_a_stable_sort(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> None:
    logits = logits.round().to(dtype)  # many ties
    order = logits[:, :VOCABULARY].argsort(dim=1, descending=True, stable=True)
    targets = targets.clamp(min=0)
    targets[:2] = order[:2, 0]
    log_probabilities, ranks = score_targets(logits, targets, VOCABULARY)
    assert ranks.tolist() == (order == targets.unsqueeze(1)).nonzero()[:, 1].tolist()
    expected = F.cross_entropy(logits[:, :VOCABULARY].double(), targets, reduction="none")
    torch.testing.assert_close(log_probabilities, -expected.float(), rtol=1e-6, atol=1e-6)


def test_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-30, 30, 20_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y = gelu(x)
    (compiled_slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, F.gelu(x, approximate="tanh"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled_slope, slope, rtol=1e-12, atol=1e-12)
    assert gelu(torch.tensor([-1e4, 1e4])).tolist() == [0.0, 1e4], "no overflow becomes a NaN"


def test_one_graph_holds_model_and_loss(targets: Tensor) -> None:
    config = tiny_config().model
    eager, compiled = build_model(config, seed=1), build_model(config, seed=1)
    tokens = torch.randint(0, config.vocab_size, (2, config.context_length), generator=torch.Generator().manual_seed(3))
    expected = tokens.roll(-1, 1)
    expected[1, 4:] = IGNORE_INDEX
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=False)
    losses = [model(tokens, expected) for model in (eager, graph)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0.0)
    _assert_same_gradients(compiled, eager)


def _assert_same_gradients(compiled: GPT2, eager: GPT2) -> None:
    for (name, one), other in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6), name

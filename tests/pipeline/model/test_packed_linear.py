"""Layers for inference compute the same as before, in the way that a measurement has found to be fastest."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from pipeline.config.schema import ModelConfig
from pipeline.model import packed_linear
from pipeline.model.gpt2 import GPT2, MLP, GeluLinear, ScoringBatch
from pipeline.model.packed_linear import (
    MEASURED_BYTES,
    WAYS,
    InferenceLinear,
    Way,
    can_pack,
    fastest_ways,
    inference_linear,
    linear_layers,
    pack_linear_layers,
)
from pipeline.model.precision import replicated_compute
from tests.pipeline.conftest import random_tokens, randomised_model, tiny_model_config
from tests.pipeline.generation.conftest import generate

if not can_pack(torch.float32):
    pytest.skip("this torch has no oneDNN", allow_module_level=True)

needs_bf16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="oneDNN has no bf16 products for this CPU")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]


@pytest.fixture
def model() -> GPT2:
    return randomised_model(tiny_model_config()).eval()


@pytest.fixture
def packed_model(model: GPT2) -> GPT2:
    """Return a packed fp32 copy of ``model``."""
    return packed_copy(model, torch.float32)


def packed_copy(model: GPT2, dtype: torch.dtype) -> GPT2:
    packed = copy.deepcopy(model)
    pack_linear_layers(packed, dtype, rows=1)
    assert isinstance(packed.h[0].mlp.c_fc, InferenceLinear)
    return packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37,), (1, 37), (3, 1, 37), (4, 37), (2, 40, 37)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_gelu", [True, False])
def test_every_way_computes_the_product(
    dtype: torch.dtype, shape: tuple[int, ...], bias: bool, with_gelu: bool
) -> None:
    torch.manual_seed(0)
    linear = (GeluLinear if with_gelu else nn.Linear)(37, 50, bias=bias)
    x = torch.randn(shape)
    weight, rounded = linear.weight.to(dtype).double(), x.to(dtype).double()
    exact = F.linear(rounded, weight, linear.bias.to(dtype).double() if bias else None)
    if with_gelu:
        exact = F.gelu(exact, approximate="tanh")
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for way in WAYS[dtype]:
        with torch.no_grad():
            found = inference_linear(linear, dtype, way)(x)
        assert found.dtype == dtype and found.shape == exact.shape
        assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()


@torch.no_grad()
def test_filled_rows_do_not_change_the_result() -> None:
    linear = nn.Linear(37, 50)
    with torch.inference_mode():  # a layer that is created here also works outside
        layer = inference_linear(linear, torch.float32, Way("packed", "filled"))
    for rows in (3, 1, 2, 4, 1):
        inputs = torch.randn(rows, 37)
        torch.testing.assert_close(layer(inputs), linear(inputs))


def test_transposed_weights_are_stored_by_columns() -> None:
    weight = torch.randn(50, 37)
    stored = Way("transposed").store(weight)
    assert torch.equal(stored, weight) and stored.stride() == (1, 50)
    assert Way("plain").store(weight) is weight


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_a_split_product_is_a_sum_over_ranges(monkeypatch: pytest.MonkeyPatch, threads: int, rows: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    bmm, counts = torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda x, y: counts.append(len(x)) or bmm(x, y))
    linear, x = nn.Linear(64, 50), torch.randn(rows, 1, 64)
    layer = inference_linear(linear, torch.float32, Way("transposed", "split"))
    torch.testing.assert_close(layer(x), linear(x))
    assert counts == [{1: 1, 2: 2, 5: 4}[threads]], "at most one range per thread, and equal ranges"


Calls = dict[Way, list[int]]  # the numbers of rows in the measured products


def delay_products(monkeypatch: pytest.MonkeyPatch, delayed: set[Way]) -> Calls:
    """Make some ways slow. Return the calls of all ways, as they happen."""
    product = Way.product
    calls: Calls = {}

    def replacement(way: Way, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        calls.setdefault(way, []).append(len(x))
        if way in delayed:
            time.sleep(0.005)
        return product(way, x, *others)

    monkeypatch.setattr(Way, "product", replacement)
    return calls


@pytest.mark.parametrize("fastest", WAYS[torch.float32])
def test_the_fastest_way_is_chosen(model: GPT2, monkeypatch: pytest.MonkeyPatch, fastest: Way) -> None:
    ways = set(WAYS[torch.float32])
    calls = delay_products(monkeypatch, ways - {fastest})
    chosen = fastest_ways(model, torch.float32, rows=3)
    assert chosen == {(layer.out_features, layer.in_features): fastest for layer in linear_layers(model)}
    assert {way: set(rows) for way, rows in calls.items()} == {
        way: {4 if way.few_rows == "filled" else 3} for way in ways
    }


def test_a_slow_way_is_measured_only_in_the_first_rounds(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Way("plain")
    calls = delay_products(monkeypatch, {slow})
    fastest_ways(model, torch.float32, rows=1)
    assert len(calls[slow]) == packed_linear.CAREFUL_ROUNDS * len(linear_layers(model))


def test_inputs_with_enough_rows_get_no_treatment(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = delay_products(monkeypatch, set())
    fastest_ways(model, torch.float32, rows=4)
    assert set(calls) == {way for way in WAYS[torch.float32] if way.few_rows == "none"}


@pytest.mark.parametrize(("preset", "blocks"), [("gpt2", 2), ("gpt2-xl", 1)])
def test_the_measured_layers_are_few(preset: str, blocks: int) -> None:
    with torch.device("meta"):
        model = GPT2(ModelConfig.model_validate({"preset": preset}))
    layers = packed_linear._measured_layers(model)
    assert layers == linear_layers(model.h[:blocks])
    assert sum(layer.weight.nbytes for layer in layers) > MEASURED_BYTES


def test_the_usual_way_is_kept_unless_another_one_is_clearly_faster() -> None:
    usual, packed, transposed, *_ = WAYS[torch.float32]
    assert packed_linear._choose({usual: 1.0, packed: 1.2, transposed: 0.97}) == usual
    assert packed_linear._choose({usual: 1.0, packed: 0.8, transposed: 0.9}) == packed


def test_without_a_number_of_rows_the_usual_way_is_chosen(model: GPT2) -> None:
    count = len(linear_layers(model))
    pack_linear_layers(model, torch.float32)
    layers = [module for module in model.modules() if isinstance(module, InferenceLinear)]
    assert len(layers) == count > model.config.n_layer
    assert {layer.way for layer in layers} == {Way("packed")}


def test_generated_tokens_are_the_same(model: GPT2, packed_model: GPT2) -> None:
    expected = list(generate(model, [3, 1, 4], 20, temperature=0))
    assert list(generate(packed_model, [3, 1, 4], 20, temperature=0)) == expected


class SwiGlu(MLP):
    """An MLP that somebody has changed to SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.c_fc, self.c_gate = (nn.Linear(config.n_embd, 4 * config.n_embd) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Doubled(GeluLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def use_swiglu(model: GPT2, _: pytest.MonkeyPatch) -> None:
    for block in model.h:
        block.mlp = SwiGlu(model.config)


def use_relu_in_the_layer(model: GPT2, _: pytest.MonkeyPatch) -> None:
    for block in model.h:
        block.mlp.c_fc.activation = F.relu


def use_relu_as_gelu(_: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the activation as a user does who edits the function ``gelu``."""
    monkeypatch.setattr(GeluLinear, "activation", staticmethod(F.relu))


def use_a_subclass(model: GPT2, _: pytest.MonkeyPatch) -> None:
    for block in model.h:
        block.mlp.c_fc.__class__ = Doubled


@pytest.mark.parametrize("change", [use_swiglu, use_relu_in_the_layer, use_relu_as_gelu, use_a_subclass])
@torch.no_grad()
def test_a_changed_mlp_computes_the_same(
    change: Callable[[GPT2, pytest.MonkeyPatch], None], model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(2, 12)
    change(model, monkeypatch)
    expected = model.logits(tokens)
    pack_linear_layers(model, torch.float32)
    torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(model.h[0].mlp.c_fc, InferenceLinear) == (change is not use_a_subclass)


@torch.no_grad()
def test_losses_and_scores_are_the_same(model: GPT2, packed_model: GPT2) -> None:
    tokens = random_tokens(2, 12)
    targets, outputs = tokens.roll(-1, 1), torch.tensor([0, 5, 17])
    torch.testing.assert_close(packed_model.loss(tokens, targets), model.loss(tokens, targets), rtol=1e-6, atol=0)
    scored = ScoringBatch(tokens, targets.flatten()[outputs], outputs)
    torch.testing.assert_close(packed_model.score(scored), model.score(scored), rtol=1e-5, atol=1e-5)


def test_the_weights_of_the_blocks_are_freed(model: GPT2) -> None:
    in_block, embedding = weakref.ref(model.h[0].mlp.c_fc.weight), model.wte.weight
    pack_linear_layers(model, torch.float32)
    assert in_block() is None
    model.assert_tied()
    assert model.wte.weight is embedding
    left = [name for name, _ in model.named_parameters() if ".ln_" not in name]
    assert left == ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"]


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16"])
@needs_bf16
@torch.no_grad()
def test_in_lower_precision_the_error_is_not_larger(model: GPT2, precision: str) -> None:
    tokens = random_tokens(2, 12)
    exact = model.logits(tokens)
    usual = replicated_compute(model, precision, torch.device("cpu"))(tokens, method="logits").float()
    found = replicated_compute(packed_copy(model, torch.bfloat16), precision, torch.device("cpu"))(
        tokens, method="logits"
    )
    assert found.dtype == torch.bfloat16
    assert 0 < (found.float() - exact).abs().max() <= 1.5 * (usual - exact).abs().max()


def test_without_packed_products_the_model_is_unchanged(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_pack(torch.float16)
    pack_linear_layers(model, torch.float16, rows=1)
    monkeypatch.setattr(packed_linear, "can_pack", lambda dtype: False)
    pack_linear_layers(model, torch.float32, rows=1)
    assert_not_packed(model)


def test_on_another_device_the_model_is_unchanged() -> None:
    with torch.device("meta"):
        model = GPT2(tiny_model_config())
    pack_linear_layers(model, torch.float32, rows=1)
    assert_not_packed(model)


def assert_not_packed(model: GPT2) -> None:
    assert not any(isinstance(module, InferenceLinear) for module in model.modules())
    assert model.lm_head.packed_product is None

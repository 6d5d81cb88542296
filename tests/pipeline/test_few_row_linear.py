"""The compiled products are those of the layers that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from pipeline import few_row_linear
from pipeline.few_row_linear import MOST_ROWS, FewRowLinear, use_few_row_products
from pipeline.generation import generate
from tests.pipeline.conftest import restless_model, tiny_model_config


def expect_product_of_layer(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(37, 50).to(dtype)
    x = torch.randn(rows, 1, 37).to(dtype)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    with torch.inference_mode():
        found = FewRowLinear(linear)(x)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Grows with each call of a function of the module."""
    calls: list[int] = []
    function = getattr(few_row_linear, name)
    monkeypatch.setattr(few_row_linear, name, lambda *x: calls.append(1) or function(*x))
    return calls


@pytest.mark.parametrize("dtype", list(MOST_ROWS))
def test_compiled_it_is_the_product_of_the_layer(dtype: torch.dtype) -> None:
    expect_product_of_layer(dtype, 1)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be compiled, as it stands: compiling takes seconds a shape."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(few_row_linear, "compiled_product", lambda: few_row_linear._few_row_product)


@pytest.mark.parametrize("dtype", list(MOST_ROWS))
@pytest.mark.usefixtures("interpreted")
def test_of_many_rows_torch_makes_the_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "_few_row_product")
    expect_product_of_layer(dtype, MOST_ROWS[dtype])
    assert len(calls) == 1
    expect_product_of_layer(dtype, MOST_ROWS[dtype] + 1)
    assert len(calls) == 1


@pytest.mark.usefixtures("interpreted")
def test_the_model_writes_the_same_with_the_same_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = restless_model(tiny_model_config()).eval()
    expected = list(generate(model, [3, 1, 4], 20, temperature=0))
    names = [name for name, _ in model.named_parameters()]
    calls = count_calls(monkeypatch, "_few_row_product")
    use_few_row_products(model)
    model.assert_tied()
    assert [name for name, _ in model.named_parameters()] == names
    assert list(generate(model, [3, 1, 4], 20, temperature=0)) == expected
    assert calls

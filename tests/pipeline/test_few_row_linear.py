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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_product_is_that_of_the_layer(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(37, 50).to(dtype)
    layer = FewRowLinear(linear)
    for rows in (1, MOST_ROWS[dtype], MOST_ROWS[dtype] + 1):
        x = torch.randn(rows, 1, 37).to(dtype)
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        with torch.inference_mode():
            found = layer(x)
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_the_model_writes_the_same_with_the_same_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = restless_model(tiny_model_config()).eval()
    expected = list(generate(model, [3, 1, 4], 20, temperature=0))
    names = [name for name, _ in model.named_parameters()]
    compiled = few_row_linear._compiled_product()
    calls = []
    monkeypatch.setattr(few_row_linear, "_compiled_product", lambda: lambda *x: calls.append(1) or compiled(*x))
    use_few_row_products(model)
    model.assert_tied()
    assert [name for name, _ in model.named_parameters()] == names
    assert list(generate(model, [3, 1, 4], 20, temperature=0)) == expected
    assert calls

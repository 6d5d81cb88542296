"""The iterations keep singular vectors and move singular values close to 1, as the formula says in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.backends.newton_schulz import orthogonalize


def random_matrix(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_singular_vectors_stay_and_singular_values_are_close_to_1(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    moved = u.mT @ orthogonalize(matrix, 5) @ vt.mT
    assert (moved - torch.diag(moved.diagonal())).abs().max() < 1e-12
    chosen = moved.diagonal()[values / torch.linalg.vector_norm(values) > 0.01]
    assert len(chosen) > 20 and chosen.min() > 0.65 and chosen.max() < 1.25


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_each_singular_value_follows_the_polynomial(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    x = values / values.square().sum().sqrt()
    for _ in range(3):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(orthogonalize(matrix, 3), u @ torch.diag(x) @ vt, rtol=1e-12, atol=1e-13)


def test_fp32_is_close_to_fp64() -> None:
    matrix = random_matrix(48, 192, torch.float32)
    exact = orthogonalize(matrix.double(), 5)
    assert (orthogonalize(matrix, 5) - exact).norm() / exact.norm() < 1e-5


def test_the_dtype_is_kept() -> None:
    result = orthogonalize(random_matrix(8, 6, torch.bfloat16), 5)
    assert result.dtype == torch.bfloat16 and result.shape == (8, 6)


def test_the_scale_of_the_matrix_does_not_matter() -> None:
    matrix = random_matrix(6, 8)
    torch.testing.assert_close(orthogonalize(matrix * 1e-3, 5), orthogonalize(matrix, 5))


def test_zeros_stay_zero() -> None:
    assert not orthogonalize(torch.zeros(4, 3), 5).any()

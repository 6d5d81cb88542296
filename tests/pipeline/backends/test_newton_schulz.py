"""The iterations keep singular vectors and move singular values close to 1, as the formula says in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.backends.newton_schulz import orthogonalize


def random_matrix(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(dtype)


def orthogonalize_one(matrix: Tensor, iterations: int) -> Tensor:
    return orthogonalize(matrix[None], iterations)[0]


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_singular_vectors_stay_and_singular_values_are_close_to_1(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    moved = u.mT @ orthogonalize_one(matrix, 5) @ vt.mT
    assert (moved - torch.diag(moved.diagonal())).abs().max() < 1e-12
    chosen = moved.diagonal()[values / torch.linalg.vector_norm(values) > 0.01]
    assert len(chosen) > 20 and chosen.min() > 0.65 and chosen.max() < 1.25


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24), (24, 36)])
def test_each_singular_value_follows_the_polynomial(shape: tuple[int, int], iterations: int) -> None:
    matrix = random_matrix(*shape)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    x = values / values.square().sum().sqrt()
    for _ in range(iterations):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(orthogonalize_one(matrix, iterations), u @ torch.diag(x) @ vt, rtol=1e-12, atol=1e-13)


def test_fp32_is_close_to_fp64() -> None:
    matrix = random_matrix(48, 192, torch.float32)
    exact = orthogonalize_one(matrix.double(), 5)
    assert (orthogonalize_one(matrix, 5) - exact).norm() / exact.norm() < 1e-5


def test_the_dtype_is_kept() -> None:
    result = orthogonalize_one(random_matrix(8, 6, torch.bfloat16), 5)
    assert result.dtype == torch.bfloat16 and result.shape == (8, 6)


def test_the_scale_of_the_matrix_does_not_matter() -> None:
    matrix = random_matrix(6, 8)
    torch.testing.assert_close(orthogonalize_one(matrix * 1e-3, 5), orthogonalize_one(matrix, 5))


def test_zeros_stay_zero() -> None:
    assert not orthogonalize_one(torch.zeros(4, 3), 5).any()


def test_matrices_of_a_stack_do_not_affect_each_other() -> None:
    matrices = torch.stack([random_matrix(6, 15), torch.zeros(6, 15, dtype=torch.float64), 1e3 * random_matrix(6, 15)])
    result = orthogonalize(matrices, 5)
    assert not result[1].any()
    for i in (0, 2):
        torch.testing.assert_close(result[i], orthogonalize_one(matrices[0], 5))


@pytest.mark.parametrize("iterations", [5, 20])
@pytest.mark.parametrize("small", [0.0, 1e-2])
def test_bf16_is_stable_if_many_singular_values_are_small(small: float, iterations: int) -> None:
    """Rounding can make eigenvalues of a Gram matrix negative. The second iteration must not let them grow."""
    u, _, vt = torch.linalg.svd(random_matrix(64, 256), full_matrices=False)
    values = torch.full((64,), small, dtype=torch.float64)
    values[:8] = 1.0
    result = orthogonalize_one((u @ torch.diag(values) @ vt).to(torch.bfloat16), iterations)
    assert torch.linalg.svdvals(result.double()).max() < 1.3

"""Orthogonalize a matrix with Newton-Schulz iterations, which use only matrix products."""

import torch
from torch import Tensor

#: The coefficients of Jordan et al. 2024 ("Muon: An optimizer for hidden layers in neural networks"). They maximize the
#: slope at zero, so small singular values grow fast. After five iterations, singular values are between 0.7 and 1.2.
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_EPS = 1e-7


def orthogonalize(matrix: Tensor, iterations: int) -> Tensor:
    """Return an approximation of the orthogonal matrix that is nearest to ``matrix``, shape (rows, columns).

    The result has the singular vectors of ``matrix``, and its singular values are close to 1. Each iteration replaces X
    by a X + (b X X^T + c (X X^T)^2) X, where a, b and c are constants. If X has more rows than columns, the equal
    expression a X + X (b X^T X + c (X^T X)^2) is computed, because X^T X is then smaller than X X^T. For a matrix of
    zeros, the result is zero.

    Args:
        matrix: shape (rows, columns). Its dtype is also the dtype of the computation and of the result.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix / torch.linalg.vector_norm(matrix).clamp(min=_EPS)  # so that no singular value exceeds 1
    for _ in range(iterations):
        gram = x.mT @ x if is_tall else x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=_CUBIC, alpha=_QUINTIC)
        left, right = (x, polynomial) if is_tall else (polynomial, x)
        x = torch.addmm(x, left, right, beta=_LINEAR)
    return x

"""Orthogonalize matrices with Newton-Schulz iterations, which use only matrix products."""

import torch
from torch import Tensor

from pipeline.model.muon_matrices import iterations_per_gram

#: The coefficients of Jordan et al. 2024 ("Muon: An optimizer for hidden layers in neural networks"). Small singular
#: values grow fast. After five iterations, singular values are between 0.7 and 1.2.
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_EPS = 1e-7


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Return an approximation of the nearest orthogonal matrix for each given matrix.

    A result has the singular vectors of its matrix, and singular values close to 1. A matrix of zeros gives zeros.

    Each iteration replaces X by P X with P = a I + b G + c G^2. Here, G = X X^T is the Gram matrix, and a, b and c
    are constants. For tall matrices, X P with the smaller G = X^T X gives the same result.

    If this needs fewer FLOPs, every second iteration does not compute its Gram matrix from X. It uses P G P, with the P
    and G of the iteration before, because this is the Gram matrix of P X. To repeat this would not be stable in bf16.

    Args:
        matrices: shape (n, rows, columns), in the dtype of the computation and of the result.
    """
    rows, columns = matrices.shape[1:]
    is_tall = rows > columns
    x = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp(min=_EPS)  # singular values <= 1
    at_a_time = iterations_per_gram(rows, columns)
    for done in range(0, iterations, at_a_time):
        gram = x.mT @ x if is_tall else x @ x.mT
        if min(at_a_time, iterations - done) == 2:
            first = _polynomial(gram, _LINEAR)
            left = _polynomial(first @ gram @ first, _LINEAR) @ first
            x = x @ left.mT if is_tall else left @ x
        else:
            rest = _polynomial(gram, 0.0)
            x = torch.baddbmm(x, *((x, rest) if is_tall else (rest, x)), beta=_LINEAR)
    return x


def _polynomial(gram: Tensor, constant: float) -> Tensor:
    """Return ``constant * I + b * G + c * G^2`` for Gram matrices G, shape (n, rows, rows)."""
    result = torch.baddbmm(gram, gram, gram, beta=_CUBIC, alpha=_QUINTIC)
    result.diagonal(dim1=1, dim2=2).add_(constant)
    return result

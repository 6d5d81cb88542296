"""Orthogonalize matrices with Newton-Schulz iterations, which use only matrix products."""

import torch
from torch import Tensor

from pipeline.model.muon_matrices import iterations_per_gram

#: The coefficients of Jordan et al. 2024 ("Muon: An optimizer for hidden layers in neural networks"). They maximize the
#: slope at zero, so small singular values grow fast. After five iterations, singular values are between 0.7 and 1.2.
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_EPS = 1e-7


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Return approximations of the orthogonal matrices that are nearest to some matrices.

    A result has the same singular vectors as its matrix, and its singular values are close to 1. Each iteration
    replaces X by P X with P = a I + b G + c G^2 and G = X X^T, where a, b and c are constants. G is the Gram matrix of
    X. If X has more rows than columns, X^T X is smaller than X X^T. The function then replaces X by X P with G = X^T X,
    which gives the same result. For a matrix of zeros, the result is zero.

    If X is far from square, a product with X needs more FLOPs than a product of two Gram matrices. The function then
    computes a Gram matrix from X only in every second iteration. In the iterations between them, it computes the Gram
    matrix of P X as P G P, without a product with X. More than two iterations without a new Gram matrix from X would
    not be stable in bf16.

    Args:
        matrices: shape (n, rows, columns). Its dtype is also the dtype of the computation and of the result.
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
    """Return constant I + b G + c G^2, shape (n, rows, rows), for Gram matrices G of the same shape."""
    result = torch.baddbmm(gram, gram, gram, beta=_CUBIC, alpha=_QUINTIC)
    result.diagonal(dim1=1, dim2=2).add_(constant)
    return result

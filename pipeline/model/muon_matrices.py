"""List the weight matrices that Muon updates, and divide them among the ranks.

Muon updates the weight matrices of the transformer blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_QUERY_KEY_VALUE = "attn.c_attn.weight"
_MIN_BATCH_ELEMENTS = 1 << 24
_LARGEST_MATRICES_PER_RANK = 2


@dataclass(frozen=True)
class Matrix:
    """A matrix that Muon orthogonalizes: a whole parameter, or consecutive rows of a parameter."""

    name: str  # the canonical name of the parameter
    start: int  # the first element, counted in the flattened parameter
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        """Return the index after the matrix's last element, in the flattened parameter."""
        return self.start + self.numel

    @property
    def cost(self) -> int:
        """Return a number that is proportional to the time of orthogonalizing this matrix."""
        return self.numel * min(self.rows, self.columns)

    @property
    def flops_per_iteration(self) -> int:
        """Return the FLOPs of one Newton-Schulz iteration, which consists of three matrix products."""
        return 4 * self.cost + 2 * min(self.rows, self.columns) ** 3

    @property
    def update_scale(self) -> float:
        """Return the factor by which Muon multiplies the orthogonalized matrix (Liu et al. 2025).

        With this factor, an update of Muon is about as large as an update of AdamW.
        """
        return 0.2 * math.sqrt(max(self.rows, self.columns))


def belongs_to_muon(name: str, shape: Sequence[int]) -> bool:
    """Return whether Muon updates a parameter. AdamW updates embeddings, biases and LayerNorm weights."""
    return name.startswith("h.") and len(shape) == 2


def muon_matrices(shapes: Mapping[str, Sequence[int]], *, split_qkv: bool) -> Iterator[Matrix]:
    """Yield the matrices of all parameters that Muon updates, in the order of ``shapes``.

    Args:
        shapes: maps canonical names of parameters to their shapes.
        split_qkv: whether the weight of the projection to queries, keys and values is split into three matrices.
    """
    for name, shape in shapes.items():
        if belongs_to_muon(name, shape):
            count = 3 if split_qkv and name.endswith(_QUERY_KEY_VALUE) else 1
            rows, columns = shape[0] // count, shape[1]
            for i in range(count):
                yield Matrix(name, i * rows * columns, rows, columns)


def divide_into_batches(matrices: Sequence[Matrix], ranks: int) -> list[list[Matrix]]:
    """Divide matrices into batches of about the same size.

    The ranks exchange all matrices of a batch at once. With larger batches, the work is divided more equally among the
    ranks. With smaller batches, the exchange needs less memory. As a compromise, the size of a batch has a limit, which
    grows with the number of ranks and with the size of the largest matrix.
    """
    total = sum(matrix.numel for matrix in matrices)
    largest = max((matrix.numel for matrix in matrices), default=0)
    limit = max(_MIN_BATCH_ELEMENTS, _LARGEST_MATRICES_PER_RANK * ranks * largest)
    batches: list[list[Matrix]] = [[] for _ in range(-(-total // limit))]
    before = 0
    for matrix in matrices:
        batches[before * len(batches) // total].append(matrix)
        before += matrix.numel
    return batches


def assign_owners(matrices: Iterable[Matrix], ranks: int) -> list[list[Matrix]]:
    """Assign matrices to ranks. Return the matrices of each rank.

    The rank of a matrix is called its owner, and orthogonalizes it. The matrices are assigned in the order of
    decreasing cost. Each matrix goes to the rank that has the least work so far.
    """
    owned: list[list[Matrix]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for matrix in sorted(matrices, key=lambda matrix: -matrix.cost):  # sorted() is stable, so all ranks agree
        rank = work.index(min(work))
        owned[rank].append(matrix)
        work[rank] += matrix.cost
    return owned


def exchange_elements(batch: Sequence[Matrix], ranks: int, ranks_per_copy: int) -> int:
    """Return how many elements a rank needs in memory to exchange and orthogonalize a batch of matrices.

    If some ranks need more than others, the result is the number for the rank that needs most.

    Args:
        batch: the matrices of the batch.
        ranks: the number of ranks.
        ranks_per_copy: the number of ranks that together hold one copy of all matrices.
    """
    total = sum(matrix.numel for matrix in batch)
    own = max(sum(matrix.numel for matrix in owned) for owned in assign_owners(batch, ranks))
    share = own if ranks_per_copy == 1 else -(-total // ranks)  # of the elements that a rank sends to the owners
    assembling = share + own * (2 if ranks > 1 else 1)
    held = 0 if ranks == 1 else -(-total // ranks_per_copy)  # the elements that a rank receives
    returning = own + own * (ranks // ranks_per_copy) + held
    iterating = own + max(3 * matrix.numel + 2 * min(matrix.rows, matrix.columns) ** 2 for matrix in batch)
    return max(assembling, iterating, returning)

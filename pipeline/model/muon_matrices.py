"""List the matrices that Muon updates, the weights of the transformer blocks, and divide them among the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_QUERY_KEY_VALUE = "attn.c_attn.weight"
_MIN_BATCH_ELEMENTS = 1 << 24
_LARGEST_MATRICES_PER_RANK = 2


@dataclass(frozen=True)
class Matrix:
    """A matrix that Muon orthogonalizes. It consists of all rows or of consecutive rows of a parameter."""

    name: str  # the canonical name of the parameter
    start: int  # the first element, counted in the flattened parameter
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        """The index after the last element, counted in the flattened parameter."""
        return self.start + self.numel

    @property
    def cost(self) -> int:
        """The cost of an iteration's matrix products, in a unit that is the same for all matrices."""
        return self.numel * min(self.rows, self.columns)

    @property
    def flops_per_iteration(self) -> int:
        """The FLOPs of the three matrix products of a Newton-Schulz iteration."""
        return 4 * self.cost + 2 * min(self.rows, self.columns) ** 3

    @property
    def update_scale(self) -> float:
        """The factor by which the orthogonal matrix is multiplied (Liu et al. 2025).

        With this factor, an update of Muon is about as large as an update of AdamW.
        """
        return 0.2 * math.sqrt(max(self.rows, self.columns))


def belongs_to_muon(name: str, shape: Sequence[int]) -> bool:
    """Return whether Muon updates a parameter. AdamW updates the embeddings, biases and LayerNorm weights."""
    return name.startswith("h.") and len(shape) == 2


def muon_matrices(shapes: Mapping[str, Sequence[int]], *, split_qkv: bool) -> Iterator[Matrix]:
    """Yield the matrices of all parameters that Muon updates, in the order of ``shapes``.

    Args:
        shapes: the shapes of parameters, by canonical name.
        split_qkv: whether the projection to queries, keys and values counts as three matrices instead of one.
    """
    for name, shape in shapes.items():
        if belongs_to_muon(name, shape):
            count = 3 if split_qkv and name.endswith(_QUERY_KEY_VALUE) else 1
            rows, columns = shape[0] // count, shape[1]
            for i in range(count):
                yield Matrix(name, i * rows * columns, rows, columns)


def divide_into_batches(matrices: Sequence[Matrix], ranks: int) -> list[list[Matrix]]:
    """Divide matrices into batches of consecutive matrices. All batches have about the same size.

    A batch is large enough that all ranks can have about the same work. It is small enough that the exchange of a batch
    does not need much memory.
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
    """Return the matrices that each rank owns.

    The matrices are assigned in the order of decreasing cost. Each matrix goes to the rank with the least work so far.
    """
    owned: list[list[Matrix]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for matrix in sorted(matrices, key=lambda matrix: -matrix.cost):  # sorted() is stable, so all ranks agree
        rank = work.index(min(work))
        owned[rank].append(matrix)
        work[rank] += matrix.cost
    return owned


def exchange_elements(batch: Sequence[Matrix], ranks: int, *, replicated: bool) -> int:
    """Return the largest number of elements that a rank holds while a batch is exchanged and orthogonalized.

    Args:
        replicated: whether every rank holds all elements of all matrices.
    """
    total = sum(matrix.numel for matrix in batch)
    own = max(sum(matrix.numel for matrix in owned) for owned in assign_owners(batch, ranks))
    share = own if replicated else -(-total // ranks)  # of the elements that a rank sends to the owners
    assembling = share + own * (2 if ranks > 1 else 1)
    returning = own + (ranks * own if replicated else own) + (0 if ranks == 1 else total if replicated else share)
    iterating = own + max(3 * matrix.numel + 2 * min(matrix.rows, matrix.columns) ** 2 for matrix in batch)
    return max(assembling, iterating, returning)

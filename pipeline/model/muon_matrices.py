"""List the weight matrices that Muon updates, and divide them among the ranks."""

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
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        """Return the index after the matrix's last element in the flattened parameter."""
        return self.start + self.numel

    @property
    def cost(self) -> int:
        """Return a number that is proportional to the time of orthogonalizing this matrix."""
        return self.numel * min(self.rows, self.columns)

    def orthogonalization_flops(self, iterations: int) -> int:
        smaller = 2 * min(self.rows, self.columns) ** 3  # a product of two Gram matrices
        pairs = iterations // 2 if iterations_per_gram(self.rows, self.columns) == 2 else 0
        singles = iterations - 2 * pairs
        return pairs * (4 * self.cost + 5 * smaller) + singles * (4 * self.cost + smaller)

    @property
    def update_scale(self) -> float:
        """Return the factor by which Muon multiplies the orthogonalized matrix (Liu et al. 2025).

        With this factor, an update of Muon is about as large as an update of AdamW.
        """
        return 0.2 * math.sqrt(max(self.rows, self.columns))


def iterations_per_gram(rows: int, columns: int) -> int:
    """Return how many Newton-Schulz iterations share one Gram matrix: 2 if this needs fewer FLOPs, otherwise 1.

    For two iterations, sharing saves two products of a (rows, columns) matrix and a Gram matrix. It adds three products
    of two Gram matrices.
    """
    return 2 if 2 * max(rows, columns) > 3 * min(rows, columns) else 1


def belongs_to_muon(name: str, shape: Sequence[int]) -> bool:
    """Return whether Muon updates a parameter. AdamW updates embeddings, biases and LayerNorm weights."""
    return name.startswith("h.") and len(shape) == 2


def muon_matrices(shapes: Mapping[str, Sequence[int]], *, split_qkv: bool) -> Iterator[Matrix]:
    """Yield the matrices of all parameters that Muon updates, in the order of ``shapes``.

    Args:
        split_qkv: whether the weight for queries, keys and values counts as three matrices.
    """
    for name, shape in shapes.items():
        if belongs_to_muon(name, shape):
            count = 3 if split_qkv and name.endswith(_QUERY_KEY_VALUE) else 1
            rows, columns = shape[0] // count, shape[1]
            for i in range(count):
                yield Matrix(name, i * rows * columns, rows, columns)


def divide_into_batches(matrices: Sequence[Matrix], ranks: int) -> list[list[Matrix]]:
    """Divide matrices into batches of about the same size. The ranks exchange one batch at a time.

    Large batches divide the work more equally among the ranks. Small batches need less memory.
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
    """Return the matrices that each rank owns (orthogonalizes).

    The most expensive matrices are assigned first. Each matrix goes to the rank that has the least work so far.
    """
    owned: list[list[Matrix]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for matrix in sorted(matrices, key=lambda matrix: -matrix.cost):  # sorted() is stable, so all ranks agree
        rank = work.index(min(work))
        owned[rank].append(matrix)
        work[rank] += matrix.cost
    return owned


def group_by_shape(matrices: Iterable[Matrix]) -> list[list[Matrix]]:
    groups: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.rows, matrix.columns), []).append(matrix)
    return list(groups.values())


def exchange_elements(batch: Sequence[Matrix], ranks: int, ranks_per_copy: int) -> int:
    """Return how many elements a rank needs in memory to exchange and orthogonalize a batch of matrices.

    The result is for the rank that needs the most memory.

    Args:
        ranks_per_copy: the number of ranks that together hold one copy of all matrices.
    """
    total = sum(matrix.numel for matrix in batch)
    own = max(sum(matrix.numel for matrix in owned) for owned in assign_owners(batch, ranks))
    assembling = own if ranks_per_copy == 1 else 2 * own + -(-total // ranks)  # sent and received elements
    held = -(-total // ranks_per_copy)  # the elements that a rank receives
    returning = own if ranks == 1 else own + own * (ranks // ranks_per_copy) + held
    iterating = own + max(_elements_to_iterate(owned) for owned in assign_owners(batch, ranks))
    return max(assembling, iterating, returning)


def _elements_to_iterate(owned: Iterable[Matrix]) -> int:
    groups = group_by_shape(owned)
    return max((sum(2 * m.numel + 4 * min(m.rows, m.columns) ** 2 for m in group) for group in groups), default=0)

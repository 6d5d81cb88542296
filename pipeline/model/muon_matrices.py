"""List the matrices that Muon updates: the weights of the transformer blocks, without biases and LayerNorm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_QUERY_KEY_VALUE = "attn.c_attn.weight"


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

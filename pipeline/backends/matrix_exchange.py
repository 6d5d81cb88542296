"""Transform matrices whose elements are distributed over the ranks.

Each matrix is transformed on one rank, which is called its owner. The owner receives all elements of the matrix,
transforms the matrix, and sends the new elements back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed.world import World
from pipeline.model.muon_matrices import Matrix, assign_owners, divide_into_batches


@dataclass(frozen=True)
class Span:
    """A range of elements of a flattened parameter. All elements of the range are on one rank."""

    name: str  # the canonical name of the parameter
    start: int
    stop: int


@dataclass(frozen=True)
class _Overlap:
    """The elements that are in a rank's span and in a matrix, counted in the flattened parameter."""

    span: int  # the index of the span among all spans of its rank
    matrix: Matrix
    start: int
    stop: int


class MatrixExchange:
    """Transforms matrices. Each matrix has an owner, which is the rank that transforms it.

    The matrices are processed in batches. For each batch, one all-to-all sends the elements to the owners. A second
    all-to-all sends the new elements to the ranks that hold them. The owners of a batch are chosen so that all ranks
    have about the same amount of work. If the ranks hold several copies of the elements, an owner receives the elements
    of only one copy. It sends the same new elements to all copies, so the copies stay equal.

    Args:
        spans: for each rank, the ranges of parameters that the rank holds.
        ranks_per_copy: the number of consecutive ranks that together hold one copy of all elements.
        dtype: the dtype of the transformation and of the communication.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        spans: Sequence[Sequence[Span]],
        world: World,
        *,
        ranks_per_copy: int,
        dtype: torch.dtype,
    ) -> None:
        self.world = world
        self.dtype = dtype
        self._batches = [
            _Batch(batch, spans, world, ranks_per_copy) for batch in divide_into_batches(matrices, world.size)
        ]

    def transform(self, elements: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> None:
        """Replace each matrix by ``function(matrix)`` times ``Matrix.update_scale``.

        This call is collective: every rank must make it.

        Args:
                elements: for each span (range of a parameter) on this rank, a tensor of shape (n,) with its elements.
                    The tensors are changed in place.
            function: a function that takes a matrix on ``world.device`` and returns a matrix of the same shape.
        """
        for batch in self._batches:
            whole = self._assemble(batch, elements)
            for matrix, flat in whole.items():
                view = flat.view(matrix.rows, matrix.columns)
                view.copy_(function(view))
            self._return(batch, whole, elements)

    def _assemble(self, batch: _Batch, elements: Sequence[Tensor]) -> dict[Matrix, Tensor]:
        """Return the matrices that this rank owns."""
        sent = [elements[o.span][o.start - batch.first(o.span) : o.stop - batch.first(o.span)] for o in batch.sent]
        received = self._all_to_all(sent, batch.sizes_sent, batch.sizes_received)
        whole = {
            matrix: torch.empty(matrix.numel, dtype=self.dtype, device=self.world.device) for matrix in batch.owned
        }
        for overlap, values in zip(batch.received, _split(received, batch.received), strict=True):
            whole[overlap.matrix][overlap.start - overlap.matrix.start : overlap.stop - overlap.matrix.start] = values
        return whole

    def _return(self, batch: _Batch, flat: dict[Matrix, Tensor], elements: Sequence[Tensor]) -> None:
        """Send the matrices of this rank to all ranks that hold their elements, and write the received elements."""
        sent = [flat[o.matrix][o.start - o.matrix.start : o.stop - o.matrix.start] for o in batch.returned]
        received = self._all_to_all(sent, batch.sizes_returned, batch.sizes_kept)
        for overlap, values in zip(batch.kept, _split(received, batch.kept), strict=True):
            first = batch.first(overlap.span)
            target = elements[overlap.span][overlap.start - first : overlap.stop - first]
            target.copy_(values).mul_(overlap.matrix.update_scale)

    def _all_to_all(self, sent: list[Tensor], sizes_sent: list[int], sizes_received: list[int]) -> Tensor:
        """Concatenate tensors, send a share of the elements to each rank, and return the received elements."""
        sending = torch.empty(sum(sizes_sent), dtype=self.dtype, device=self.world.device)
        for target, values in zip(torch.split(sending, [len(values) for values in sent]), sent, strict=True):
            target.copy_(values)
        if self.world.size == 1:
            return sending
        received = sending.new_empty(sum(sizes_received))
        dist.all_to_all_single(received, sending, sizes_received, sizes_sent, group=self.world.group)
        return received


class _Batch:
    """The owners of some matrices, and the elements that this rank exchanges with each other rank."""

    def __init__(
        self, matrices: Sequence[Matrix], spans: Sequence[Sequence[Span]], world: World, ranks_per_copy: int
    ) -> None:
        own = spans[world.rank]
        self._firsts = [span.start for span in own]
        owned = assign_owners(matrices, world.size)
        self.owned = owned[world.rank]
        holders = [_overlaps(spans[rank], self.owned) for rank in range(world.size)]
        owners = [_overlaps(own, owned[rank]) for rank in range(world.size)]
        self.returned, self.sizes_returned = _flatten(holders)
        self.kept, self.sizes_kept = _flatten(owners)
        first = world.rank - world.rank % ranks_per_copy
        own_copy = range(first, first + ranks_per_copy)
        holders = [overlaps if rank in own_copy else [] for rank, overlaps in enumerate(holders)]
        owners = [overlaps if rank in own_copy else [] for rank, overlaps in enumerate(owners)]
        self.received, self.sizes_received = _flatten(holders)
        self.sent, self.sizes_sent = _flatten(owners)

    def first(self, span: int) -> int:
        """Return the first element of one of this rank's spans, counted in the flattened parameter."""
        return self._firsts[span]


def _overlaps(spans: Sequence[Span], matrices: Iterable[Matrix]) -> list[_Overlap]:
    """Return the elements of the matrices that are in the spans, in the order of the matrices."""
    by_name: dict[str, list[int]] = {}
    for i, span in enumerate(spans):
        by_name.setdefault(span.name, []).append(i)
    found = (
        _Overlap(i, matrix, max(spans[i].start, matrix.start), min(spans[i].stop, matrix.stop))
        for matrix in matrices
        for i in by_name.get(matrix.name, ())
    )
    return [overlap for overlap in found if overlap.start < overlap.stop]


def _flatten(by_rank: Iterable[Sequence[_Overlap]]) -> tuple[list[_Overlap], list[int]]:
    """Return the overlaps of all ranks in one list, and the number of elements of each rank."""
    by_rank = list(by_rank)
    sizes = [sum(overlap.stop - overlap.start for overlap in overlaps) for overlaps in by_rank]
    return [overlap for overlaps in by_rank for overlap in overlaps], sizes


def _split(received: Tensor, overlaps: Sequence[_Overlap]) -> tuple[Tensor, ...]:
    return torch.split(received, [overlap.stop - overlap.start for overlap in overlaps])

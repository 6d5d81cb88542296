"""Transform matrices whose elements are distributed over the ranks.

Each matrix belongs to one rank, its owner. The owner receives all elements of the matrix, transforms the matrix, and
sends the new elements back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed.world import World
from pipeline.model.muon_matrices import Matrix, assign_owners, divide_into_batches, group_by_shape


@dataclass(frozen=True)
class Span:
    """A range of a flattened parameter. One rank holds the whole range."""

    name: str  # the canonical name of the parameter
    start: int
    stop: int


@dataclass(frozen=True)
class _Overlap:
    """The elements that are both in a span and in a matrix."""

    span: int  # the index of the span among all spans of its rank
    matrix: Matrix
    in_span: slice  # the elements, counted in the span
    in_matrix: slice  # the elements, counted in the flattened matrix
    numel: int


class MatrixExchange:
    """Applies functions to matrices whose elements are divided among the ranks.

    One rank is the owner of each matrix. The owner receives all elements of the matrix, applies the function, and
    returns the results. If the ranks hold several copies of the matrices, the owner receives only one copy. The results
    go to the ranks of all copies.

    Args:
        spans: for each rank, the ranges of parameters that the rank holds.
        ranks_per_copy: the number of consecutive ranks that together hold one copy of all elements.
        dtype: the dtype in which ranks send the elements and the owner applies the function.
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
        self.ranks_per_copy = ranks_per_copy
        self.dtype = dtype
        self._batches = [
            _Batch(batch, spans, world, ranks_per_copy) for batch in divide_into_batches(matrices, world.size)
        ]

    def add_transformed(
        self,
        elements: Sequence[Tensor],
        targets: Sequence[Tensor],
        function: Callable[[Tensor], Tensor],
        *,
        alpha: float = 1.0,
    ) -> None:
        """Transform every matrix, scale the result by ``alpha * Matrix.update_scale``, and add it to the targets.

        Every rank must call this.

        Args:
            elements: the matrix elements that this rank holds. One tensor per range in ``spans[rank]``, of shape
                (length of the range,).
            targets: fp32 tensors, in the same order and with the same shapes as ``elements``. They are changed in
                place. They can be on any device.
            function: transforms matrices that have equal shapes. It takes and returns a tensor
                (matrices, rows, columns) on ``world.device``.
        """
        for batch in self._batches:
            stacks = self._assemble(batch, elements)
            for i, stack in enumerate(stacks):
                stacks[i] = function(stack)
            self._return(batch, stacks, targets, alpha)

    def _assemble(self, batch: _Batch, elements: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrices that this rank owns, one tensor (n, rows, columns) per shape."""
        sent = [[elements[o.span][o.in_span] for o in overlaps] for overlaps in batch.sent]
        received = self._all_to_all(sent, batch.received) if self.ranks_per_copy > 1 else sent
        shapes = [(len(stack), stack[0].rows, stack[0].columns) for stack in batch.stacks]
        stacks = [torch.empty(shape, dtype=self.dtype, device=self.world.device) for shape in shapes]
        flat = batch.by_matrix(stacks)
        for overlap, values in zip(chain(*batch.received), chain(*received), strict=True):
            flat[overlap.matrix][overlap.in_matrix] = values
        return stacks

    def _return(self, batch: _Batch, stacks: list[Tensor], targets: Sequence[Tensor], alpha: float) -> None:
        """Send the owned matrices to all ranks that hold their elements. Add the received elements to the targets."""
        flat = batch.by_matrix(stacks)
        sent = [[flat[o.matrix][o.in_matrix] for o in overlaps] for overlaps in batch.returned]
        received = self._all_to_all(sent, batch.kept) if self.world.size > 1 else sent
        for overlap, values in zip(chain(*batch.kept), chain(*received), strict=True):
            target = targets[overlap.span][overlap.in_span]
            # With offload, the targets are in host memory.
            target.add_(values.to(target.device), alpha=alpha * overlap.matrix.update_scale)

    def _all_to_all(self, sent: list[list[Tensor]], overlaps: list[list[_Overlap]]) -> list[list[Tensor]]:
        """Send the tensors ``sent[rank]`` to each rank. Return what each rank sends to this rank.

        The result has one tensor (n,) per overlap.

        Tensors for this rank itself are not copied.
        """
        own = self.world.rank
        tensors = [[] if rank == own else to_rank for rank, to_rank in enumerate(sent)]
        lengths = [[] if rank == own else [o.numel for o in each] for rank, each in enumerate(overlaps)]
        sizes_sent = [sum(map(len, to_rank)) for to_rank in tensors]
        sizes_received = [sum(of_rank) for of_rank in lengths]
        sending = torch.empty(sum(sizes_sent), dtype=self.dtype, device=self.world.device)
        for target, values in zip(
            torch.split(sending, [len(t) for t in chain(*tensors)]), chain(*tensors), strict=True
        ):
            target.copy_(values)
        receiving = sending.new_empty(sum(sizes_received))
        dist.all_to_all_single(receiving, sending, sizes_received, sizes_sent, group=self.world.group)
        received = [
            list(torch.split(r, n)) for r, n in zip(torch.split(receiving, sizes_received), lengths, strict=True)
        ]
        received[own] = sent[own]
        return received


class _Batch:
    """Matrices that are exchanged together, with their owners and the elements that this rank exchanges."""

    def __init__(
        self, matrices: Sequence[Matrix], spans: Sequence[Sequence[Span]], world: World, ranks_per_copy: int
    ) -> None:
        own = spans[world.rank]
        owned = assign_owners(matrices, world.size)
        self.stacks = group_by_shape(owned[world.rank])
        self.returned = [_overlaps(spans[rank], owned[world.rank]) for rank in range(world.size)]
        self.kept = [_overlaps(own, owned[rank]) for rank in range(world.size)]
        first = world.rank - world.rank % ranks_per_copy
        own_copy = range(first, first + ranks_per_copy)
        self.received = [overlaps if rank in own_copy else [] for rank, overlaps in enumerate(self.returned)]
        self.sent = [overlaps if rank in own_copy else [] for rank, overlaps in enumerate(self.kept)]

    def by_matrix(self, stacks: Iterable[Tensor]) -> dict[Matrix, Tensor]:
        """Return the flattened matrices that this rank owns. ``stacks`` has one tensor (n, rows, columns) per shape."""
        return {
            matrix: values.reshape(-1)
            for matrices, stack in zip(self.stacks, stacks, strict=True)
            for matrix, values in zip(matrices, stack, strict=True)
        }


def _overlaps(spans: Sequence[Span], matrices: Iterable[Matrix]) -> list[_Overlap]:
    by_name: dict[str, list[int]] = {}
    for i, span in enumerate(spans):
        by_name.setdefault(span.name, []).append(i)
    found = []
    for matrix in matrices:
        for i in by_name.get(matrix.name, ()):
            span = spans[i]
            start, stop = max(span.start, matrix.start), min(span.stop, matrix.stop)
            if start < stop:
                in_span = slice(start - span.start, stop - span.start)
                in_matrix = slice(start - matrix.start, stop - matrix.start)
                found.append(_Overlap(i, matrix, in_span, in_matrix, stop - start))
    return found

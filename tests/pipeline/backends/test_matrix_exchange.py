"""Matrices cut between ranks in any way are assembled, transformed and returned. The ranks are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.backends import matrix_exchange
from pipeline.backends.matrix_exchange import MatrixExchange, Span
from pipeline.distributed.world import World
from pipeline.model.muon_matrices import muon_matrices

SHAPES = {"h.0.attn.c_attn.weight": (21, 7), "h.0.mlp.c_fc.weight": (28, 7), "h.1.mlp.c_proj.weight": (7, 28)}
MATRICES = list(muon_matrices(SHAPES, split_qkv=True))


class ThreadedRanks:
    """Runs a function on several ranks, one per thread, and replaces ``all_to_all_single`` between them."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size = size
        self.calls = 0
        self._rank = threading.local()
        self._sent: list[list[Tensor]] = [[] for _ in range(size)]
        self._barrier = threading.Barrier(size)
        monkeypatch.setattr(matrix_exchange.dist, "all_to_all_single", self.all_to_all_single)

    def run(self, function: Callable[[World], Any]) -> list[Any]:
        def on_rank(rank: int) -> Any:
            self._rank.number = rank
            return function(World(rank, self.size, rank, torch.device("cpu")))

        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(on_rank, range(self.size)))

    def all_to_all_single(
        self, received: Tensor, sent: Tensor, sizes_received: list[int], sizes_sent: list[int], group: Any
    ) -> None:
        rank = self._rank.number
        self._sent[rank] = list(torch.split(sent, sizes_sent))
        self._barrier.wait(30)
        shares = [self._sent[source][rank] for source in range(self.size)]
        assert [len(share) for share in shares] == sizes_received
        torch.cat(shares, out=received)
        self._barrier.wait(30)
        self.calls += rank == 0


def whole_parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cut(length: int, rank: int, ranks: int) -> list[Span]:
    """Return every ``ranks``-th range of ``length`` elements."""
    spans = []
    for name, parameter in whole_parameters().items():
        n = parameter.numel()
        spans += [Span(name, low, min(low + length, n)) for low in range(0, n, length)][rank::ranks]
    return spans


@pytest.mark.parametrize(("ranks", "ranks_per_copy"), [(1, 1), (2, 2), (4, 4), (2, 1), (4, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("length", [5, 64, 1000])
def test_every_matrix_is_transformed_once(
    monkeypatch: pytest.MonkeyPatch, ranks: int, ranks_per_copy: int, length: int
) -> None:
    """One copy of the elements on all ranks, one copy on each rank, and copies that several ranks share."""
    threaded = ThreadedRanks(ranks, monkeypatch)
    seen: list[tuple[int, int]] = []

    def transform(world: World) -> list[Tensor]:
        spans = [cut(length, rank % ranks_per_copy, ranks_per_copy) for rank in range(ranks)]
        exchange = MatrixExchange(MATRICES, spans, world, ranks_per_copy=ranks_per_copy, dtype=torch.float32)
        parameters = whole_parameters()
        elements = [parameters[span.name].view(-1)[span.start : span.stop].clone() for span in spans[world.rank]]

        def function(matrices: Tensor) -> Tensor:
            count, rows, columns = matrices.shape
            seen.extend([(rows, columns)] * count)
            return matrices.cumsum(1)

        targets = [torch.ones_like(values) for values in elements]
        exchange.add_transformed(elements, targets, function, alpha=-0.5)
        return targets

    results = threaded.run(transform)
    assert sorted(seen) == sorted((matrix.rows, matrix.columns) for matrix in MATRICES)
    assert threaded.calls == (ranks > 1) + (ranks_per_copy > 1), "one all-to-all for all matrices, in each direction"
    expected = whole_parameters()
    for matrix in MATRICES:
        rows = expected[matrix.name].view(-1)[matrix.start : matrix.stop].view(matrix.rows, matrix.columns)
        rows.copy_(1 - 0.5 * rows.cumsum(0) * matrix.update_scale)
    for rank, elements in enumerate(results):
        for span, found in zip(cut(length, rank % ranks_per_copy, ranks_per_copy), elements, strict=True):
            torch.testing.assert_close(found, expected[span.name].view(-1)[span.start : span.stop])
        for first, found in zip(results[rank % ranks_per_copy], elements, strict=True):
            assert torch.equal(first, found), "copies are equal bit for bit"


@pytest.mark.gpu
def test_with_offload_the_elements_and_targets_are_in_host_memory(gpu: torch.device) -> None:
    spans = [cut(1000, 0, 1)]
    exchange = MatrixExchange(MATRICES, spans, World(0, 1, 0, gpu), ranks_per_copy=1, dtype=torch.float32)
    parameters = whole_parameters()
    elements = [parameters[span.name].view(-1)[span.start : span.stop].clone() for span in spans[0]]
    targets = [torch.zeros_like(values) for values in elements]
    exchange.add_transformed(elements, targets, lambda matrices: 2 * matrices)
    for span, values, target in zip(spans[0], elements, targets, strict=True):
        (scale,) = {matrix.update_scale for matrix in MATRICES if matrix.name == span.name}
        torch.testing.assert_close(target, 2 * scale * values)

"""Optimize the matrices of the transformer blocks with Muon, and all other parameters with AdamW.

Muon (Jordan et al. 2024) updates a weight matrix with the orthogonal matrix that is nearest to the momentum matrix. One
rank receives the whole momentum matrix and computes the orthogonal matrix. It sends the result to the ranks that hold
the weight matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.backends.eager_optimizers import EagerOptimizer
from pipeline.backends.matrix_exchange import MatrixExchange, Span
from pipeline.backends.newton_schulz import orthogonalize
from pipeline.backends.ranges import Range, local_elements
from pipeline.config.schema import MuonConfig
from pipeline.distributed.world import World
from pipeline.model.muon_matrices import belongs_to_muon, muon_matrices
from pipeline.model.parameter_state import MOMENTUM

_IS_MUON = "is_muon"  # the key that marks the parameter groups of Muon


class Muon(EagerOptimizer):
    """An optimizer that updates some matrices with Muon, and all other parameters with an AdamW optimizer.

    A *master* is a tensor that the optimizer updates. Under ZeRO-1 to ZeRO-3, a master contains ranges of several
    parameters. Under other backends, a master is one parameter. Call ``use_ranges`` before the first step.

    Args:
        parameters: maps canonical names to the parameters that Muon updates.
        adamw: the optimizer for all other parameters. ``Muon`` shares the optimizer's ``param_groups`` and ``state``.
        dtype: the dtype of the Newton-Schulz iterations and of the communication.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adamw: torch.optim.Optimizer,
        config: MuonConfig,
        world: World,
        *,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        learning_rate = adamw.param_groups[0]["lr"]
        super().__init__(parameters.values(), {"lr": learning_rate, "weight_decay": weight_decay, _IS_MUON: True})
        self.adamw = adamw
        self.param_groups += adamw.param_groups
        self.state = adamw.state
        self.config = config
        self.world = world
        self.dtype = dtype
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._ranges: list[Range] = []
        self._spans: list[list[tuple[int, Span]]] = []  # per rank: (index of the master, span)
        self._indices: dict[int, int] = {}  # id(master) -> index of the master
        self._exchanges: dict[tuple[int, ...], MatrixExchange] = {}

    def use_ranges(self, masters: Iterable[Tensor], ranges: Iterable[Range], ranks_per_copy: int) -> None:
        """Record which range of a parameter each master contains. Masters are the tensors that the optimizer updates.

        Every rank must call this.

        Args:
            masters: all masters on this rank, in the same order on every rank.
            ranks_per_copy: the number of consecutive ranks that together hold one copy of all masters.
        """
        self.ranks_per_copy = ranks_per_copy
        self._indices = {id(master): i for i, master in enumerate(masters)}
        self._ranges = [held for held in ranges if held.name in self.shapes and held.length]
        own = [(self._indices[id(held.master)], Span(held.name, held.start, held.stop)) for held in self._ranges]
        self._spans = self.world.gather(own)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # no backend passes a closure
        """Update all tensors that have a gradient.

        Every rank must call this. The parameter groups must be the same on all ranks.
        """
        assert closure is None
        self.adamw.param_groups = [group for group in self.param_groups if not group.get(_IS_MUON)]
        if self.adamw.param_groups:
            self.adamw.step()
        for group in self.param_groups:
            masters = [master for master in group["params"] if master.grad is not None]
            if group.get(_IS_MUON) and masters:
                self._update(masters, group["lr"], group["weight_decay"])

    def _update(self, masters: list[Tensor], learning_rate: float, weight_decay: float) -> None:
        """Update masters. To save memory, Nesterov's momentum is written into the gradients."""
        gradients = [local_elements(master.grad) for master in masters]  # type: ignore[arg-type]
        momenta = [local_elements(self._momentum(master)) for master in masters]
        torch._foreach_lerp_(momenta, gradients, 1 - self.config.momentum)
        if self.config.nesterov:
            torch._foreach_lerp_(gradients, momenta, self.config.momentum)
        directions = gradients if self.config.nesterov else momenta
        torch._foreach_mul_([local_elements(master) for master in masters], 1 - learning_rate * weight_decay)
        self._add_orthogonal(masters, directions, -learning_rate)

    def _momentum(self, master: Tensor) -> Tensor:
        state = self.state[master]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(master, requires_grad=False)
        momentum: Tensor = state[MOMENTUM]
        return momentum

    def _add_orthogonal(self, masters: list[Tensor], directions: list[Tensor], alpha: float) -> None:
        """Add ``alpha`` times the scaled orthogonal matrices of the directions to the masters."""
        indices = tuple(self._indices[id(master)] for master in masters)
        if indices not in self._exchanges:
            self._exchanges[indices] = self._create_exchange(set(indices))
        direction_of = dict(zip(indices, directions, strict=True))
        ranges = [(held, self._indices[id(held.master)]) for held in self._ranges]
        ranges = [(held, index) for held, index in ranges if index in direction_of]
        self._exchanges[indices].add_transformed(
            [held.of(direction_of[index]) for held, index in ranges],
            [held.of(held.master) for held, _ in ranges],
            partial(orthogonalize, iterations=self.config.iterations),
            alpha=alpha,
        )

    def _create_exchange(self, indices: set[int]) -> MatrixExchange:
        spans = [[span for index, span in of_rank if index in indices] for of_rank in self._spans]
        names = {span.name for of_rank in spans for span in of_rank}
        shapes = {name: shape for name, shape in self.shapes.items() if name in names}
        matrices = list(muon_matrices(shapes, split_qkv=self.config.split_qkv))
        return MatrixExchange(matrices, spans, self.world, ranks_per_copy=self.ranks_per_copy, dtype=self.dtype)


def divide_parameters(parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters that Muon updates, and all other parameters, by name."""
    muon = {name: parameter for name, parameter in parameters.items() if belongs_to_muon(name, parameter.shape)}
    return muon, {name: parameter for name, parameter in parameters.items() if name not in muon}

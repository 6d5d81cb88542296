"""Give access to the training state on one rank: fp32 master weights, optimizer state and moving averages.

The master weights (masters) are the tensors that the optimizer updates.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.backends.dtensors import is_dtensor
from pipeline.backends.muon import Muon
from pipeline.backends.ranges import Range, local_elements
from pipeline.backends.weight_average import WeightAverage
from pipeline.model.parameter_state import ADAMW_STATE, EMA, WEIGHT, StateNames


@dataclass(frozen=True)
class Fragment:
    """The weights and the optimizer state on this rank for a range of one flattened parameter.

    The tensors are views, so writing into them changes the training state. Together, the fragments of all ranks
    contain all elements of all parameters. The padding rows of the embedding are zero.
    """

    name: str  # the canonical name, as in GPT2.named_parameters()
    start: int  # the first element, counted in the flattened parameter
    weight: Tensor  # (n,) fp32 master weights
    state: dict[str, Tensor]  # the optimizer's state and the average of the weights by name, (n,) fp32 each

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return ``weight`` and the tensors of ``state``, by name."""
        return {WEIGHT: self.weight, **self.state}


class LocalState(ABC):
    """The training state of a backend on this rank.

    Args:
        optimizer: torch's AdamW, DeepSpeed's CPUAdam, or a Muon that contains one of them.
        masters: the fp32 tensors that the optimizer updates on this rank.
        state_names: maps the name of each parameter to the names of its optimizer tensors, such as ``exp_avg``. If the
            run keeps averages, ``ema`` is one of them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Iterable[Tensor], state_names: StateNames) -> None:
        self.optimizer = optimizer
        self.adamw = optimizer.adamw if isinstance(optimizer, Muon) else optimizer
        self.masters = list(masters)
        self.optimizer_names = {name: [kind for kind in kinds if kind != EMA] for name, kinds in state_names.items()}
        #: The averages of the weights. None if the run keeps no average.
        self.average = WeightAverage(self.masters) if any(EMA in kinds for kinds in state_names.values()) else None

    @abstractmethod
    def ranges(self) -> list[Range]:
        """Return the ranges of parameters that this rank's masters contain.

        All parameters in one master belong to the same parameter group.
        """

    @abstractmethod
    def publish_masters(self) -> None:
        """Copy the master weights to the weights that the model computes with.

        Call this method after you have changed values in ``fragments``.
        """

    def connect_optimizer(self, ranks_per_copy: int) -> None:
        """Tell Muon which ranges of parameters the masters contain. If the optimizer is AdamW, do nothing.

        Every rank must call this, before the first step.

        Args:
            ranks_per_copy: the number of consecutive ranks that together hold one copy of all masters.
        """
        if isinstance(self.optimizer, Muon):
            self.optimizer.use_ranges(self.masters, self.ranges(), ranks_per_copy)

    def fragments(self) -> list[Fragment]:
        """Return views of the masters, of the optimizer state and of the averages of the weights.

        Missing optimizer state and averages are created. Parameters without elements on this rank are left out.
        """
        self.create_states()
        return [
            Fragment(held.name, held.start, held.of(held.master), self._state_of(held))
            for held in self.ranges()
            if held.length
        ]

    def _state_of(self, held: Range) -> dict[str, Tensor]:
        state = {name: held.of(self.optimizer.state[held.master][name]) for name in self.optimizer_names[held.name]}
        return state if self.average is None else {**state, EMA: held.of(self.average.of(held.master))}

    def set_step_count(self, count: int) -> None:
        """Set the step count of AdamW, which determines its bias correction."""
        for state in self.adam_states():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(float(count))
            else:
                state["step"] = count

    def adam_states(self) -> list[dict[str, Any]]:
        """Return AdamW's state of each tensor that AdamW updates. Missing state is created."""
        self.create_states()
        states = (self.optimizer.state[master] for master in self.masters)
        return [state for state in states if "step" in state]

    def create_states(self) -> None:
        """Create missing optimizer state, filled with zeros."""
        for held in self.ranges():
            if not self.optimizer.state[held.master]:
                self.optimizer.state[held.master] = self._new_state(held.master, self.optimizer_names[held.name])

    def _new_state(self, master: Tensor, names: Iterable[str]) -> dict[str, Any]:
        # torch.zeros_like would fill the memory with a single thread.
        state: dict[str, Any] = {name: torch.empty_like(master, requires_grad=False).zero_() for name in names}
        if state.keys() == set(ADAMW_STATE):
            counts_in_tensor = isinstance(self.adamw, torch.optim.AdamW)  # DeepSpeed's CPUAdam counts with an int
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device) if counts_in_tensor else 0
        return state


class ParameterState(LocalState):
    """The state of a backend whose master weights are the parameters of the model.

    If a parameter is a DTensor, each rank has whole rows of it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], state_names: StateNames
    ) -> None:
        super().__init__(optimizer, parameters.values(), state_names)
        self.parameters = parameters

    def ranges(self) -> list[Range]:
        return [
            Range(name, _first_element(parameter), parameter, 0, local_elements(parameter).numel())
            for name, parameter in self.parameters.items()
        ]

    def publish_masters(self) -> None:
        """Do nothing, because the masters are the parameters of the model."""


def _first_element(parameter: Tensor) -> int:
    """Return the index of this rank's first element in the flattened parameter."""
    if not is_dtensor(parameter):
        return 0
    # Imported here because it is slow to import, and only FSDP2 needs it.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return int(offset[0]) * (parameter.numel() // parameter.shape[0])

"""Access AdamW's state and the fp32 master weights on one rank in the same way for every backend."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one parameter's elements whose training state is on this rank.

    The tensors are views, so writing into them changes the state. On a replicated backend, a fragment is a whole
    parameter. Under FSDP2 a fragment consists of whole rows, and under ZeRO it can be any range. The fragments of all
    ranks cover every element, including the vocabulary's padding rows, which are zero. Padding for alignment is not
    part of a fragment.
    """

    name: str  # the canonical name, as in GPT2.named_parameters()
    start: int  # the first element, counted in the flattened parameter
    weight: Tensor  # (n,) fp32 master weights
    exp_avg: Tensor  # (n,) fp32 first moment of AdamW
    exp_avg_sq: Tensor  # (n,) fp32 second moment of AdamW


class OptimizerState(ABC):
    """The master weights and AdamW's state of a backend on this rank.

    Args:
        optimizer: torch's AdamW or DeepSpeed's CPUAdam.
        masters: the fp32 tensors that the optimizer updates on this rank.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Iterable[Tensor]) -> None:
        self.optimizer = optimizer
        self.masters = list(masters)

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """Return views of the masters and moments. Moments that do not exist yet are created as zeros."""

    @abstractmethod
    def publish_masters(self) -> None:
        """Copy the masters to the weights that the model computes with. Call this after writing into fragments."""

    def adam_states(self) -> list[dict[str, Any]]:
        """Return AdamW's state of each master."""
        return [self.adam_state(master) for master in self.masters]

    def adam_state(self, master: Tensor) -> dict[str, Any]:
        """Return AdamW's state of one master. If the state does not exist yet, create it with zeros."""
        state = self.optimizer.state[master]
        if not state:
            counts_in_tensor = isinstance(self.optimizer, torch.optim.AdamW)  # DeepSpeed's CPUAdam counts with an int
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device) if counts_in_tensor else 0
            state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
        return state

    def views(self, master: Tensor) -> list[Tensor]:
        """Return flat views of this rank's elements of a master and of its two moments."""
        state = self.adam_state(master)
        tensors = (master, state["exp_avg"], state["exp_avg_sq"])
        return [(t.to_local() if isinstance(t, DTensor) else t).detach().view(-1) for t in tensors]


class ParameterState(OptimizerState):
    """The state of a torch optimizer that updates the masters directly.

    Each master is a whole tensor, or a DTensor of which this rank holds whole rows.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> None:
        super().__init__(optimizer, parameters.values())
        self.names = list(parameters)

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, _first_element(parameter), *self.views(parameter))
            for name, parameter in zip(self.names, self.masters, strict=True)
        ]

    def publish_masters(self) -> None:
        """Do nothing, because the model computes with the masters."""


def _first_element(parameter: Tensor) -> int:
    """Return the index of the first element of this rank's rows in the flattened parameter."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return int(offset[0]) * (parameter.numel() // parameter.shape[0])

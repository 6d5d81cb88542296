"""Where each ZeRO stage keeps the fp32 masters and moments: the private names of DeepSpeed 0.19.8, all in this file.

The tests save and resume every stage, so a release that moves them fails loudly.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.backends.base import Fragment


class ZeroState(Protocol):
    """The training state of one stage on this rank."""

    def fragments(self) -> list[Fragment]:
        """Views of masters and moments; moments that do not exist yet are made, as zeros."""

    def adam_states(self) -> list[dict[str, Any]]:
        """AdamW's state of each master tensor."""

    def publish_masters(self) -> None:
        """Take masters that were written from outside over into the compute weights."""


class ReplicatedState:
    """Stage 0: the parameters are the masters."""

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        self.optimizer = engine.optimizer
        self.parameters = {names[id(p)]: p for group in self.optimizer.param_groups for p in group["params"]}

    def fragments(self) -> list[Fragment]:
        fragments = []
        for name, parameter in self.parameters.items():
            state = _adam_state(self.optimizer, parameter)
            tensors = (parameter, state["exp_avg"], state["exp_avg_sq"])
            fragments.append(Fragment(name, 0, *(tensor.detach().view(-1) for tensor in tensors)))
        return fragments

    def adam_states(self) -> list[dict[str, Any]]:
        return [_adam_state(self.optimizer, parameter) for parameter in self.parameters.values()]

    def publish_masters(self) -> None:
        """Nothing to copy."""


class PartitionedState:
    """Stages 1 and 2: each group's parameters end to end, one run of elements per rank."""

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        self.zero = engine.optimizer
        self.names = names
        is_bf16_optimizer = hasattr(self.zero, "fp32_groups_flat_partition")
        self.groups = self.zero.bf16_groups if is_bf16_optimizer else self.zero.bit16_groups
        self.masters = (
            self.zero.fp32_groups_flat_partition if is_bf16_optimizer else self.zero.single_partition_of_fp32_groups
        )

    def fragments(self) -> list[Fragment]:
        fragments = []
        for parameters, master in zip(self.groups, self.masters, strict=True):
            state = _adam_state(self.zero.optimizer, master)
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue  # lies wholly on other ranks
                at, n = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                tensors = (master, state["exp_avg"], state["exp_avg_sq"])
                views = (tensor.detach().narrow(0, at, n) for tensor in tensors)
                fragments.append(Fragment(self.names[id(parameter)], mapping.lp_fragment_address.start, *views))
        return fragments

    def adam_states(self) -> list[dict[str, Any]]:
        return [_adam_state(self.zero.optimizer, master) for master in self.masters]

    def publish_masters(self) -> None:
        """Copy masters to the compute weights and gather them; link the moments anew."""
        self.zero.update_lp_params()
        self.zero._hp_optimizer_states_linked = False
        self.adam_states()  # linking needs them to exist
        self.zero._lazy_init_hp_params_optimizer_state()


class FullyPartitionedState:
    """Stage 3: each parameter cut into equal runs, one per rank, the last padded."""

    def __init__(self, engine: Any, names: dict[int, str], shapes: dict[str, torch.Size]) -> None:
        self.zero = engine.optimizer
        self.names, self.shapes = names, shapes
        self.rank = torch.distributed.get_rank()

    def fragments(self) -> list[Fragment]:
        return [
            fragment
            for parameters in self.zero.fp16_groups
            for parameter in parameters
            if (fragment := self._fragment(parameter)) is not None
        ]

    def _fragment(self, parameter: Tensor) -> Fragment | None:
        name = self.names[id(parameter)]
        group, at, partition_numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = self.rank * partition_numel
        n = min(partition_numel, self.shapes[name].numel() - start)
        if n <= 0:
            return None  # nothing but padding
        master = self.zero.fp32_partitioned_groups_flat[group]
        state = _adam_state(self.zero.optimizer, master)
        tensors = (master, state["exp_avg"], state["exp_avg_sq"])
        return Fragment(name, start, *(tensor.detach().narrow(0, at, n) for tensor in tensors))

    def adam_states(self) -> list[dict[str, Any]]:
        return [_adam_state(self.zero.optimizer, master) for master in self.zero.fp32_partitioned_groups_flat]

    def publish_masters(self) -> None:
        """Drop gathered weights, copy masters into the partitions, gather the persistent ones again."""
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


def state_of_stage(engine: Any, stage: int, names: dict[int, str], shapes: dict[str, torch.Size]) -> ZeroState:
    """The layout of an engine's stage.

    Args:
        names: ``id(parameter)`` to canonical name.
        shapes: canonical name to shape of the whole parameter.
    """
    if stage == 0:
        return ReplicatedState(engine, names)
    if stage == 3:
        return FullyPartitionedState(engine, names, shapes)
    return PartitionedState(engine, names)


def _adam_state(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Any]:
    """AdamW's state of one master tensor, made as zeros where no step has made it yet."""
    state = optimizer.state[master]
    if not state:
        torch_counts = isinstance(optimizer, torch.optim.AdamW)  # in a tensor; DeepSpeed's CPUAdam in an int
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device) if torch_counts else 0
        state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
    return state

"""Where ZeRO stages 1 to 3 keep fp32 masters and moments. All private names of DeepSpeed 0.19.8 are in this file.

The tests save and resume every stage, so a release that moves these names fails them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.backends.optimizer_state import Fragment, adam_state


class PartitionedState:
    """Stages 1 and 2: the parameters of each group are concatenated, and each rank has one range of the elements.

    Args:
        names: ``id(parameter)`` to canonical name.
    """

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        self.zero = engine.optimizer
        self.names = names
        is_bf16_optimizer = hasattr(self.zero, "fp32_groups_flat_partition")
        self.groups = self.zero.bf16_groups if is_bf16_optimizer else self.zero.bit16_groups
        self.masters = (
            self.zero.fp32_groups_flat_partition if is_bf16_optimizer else self.zero.single_partition_of_fp32_groups
        )

    def fragments(self) -> list[Fragment]:
        return [
            self._fragment(parameter, master)
            for parameters, master in zip(self.groups, self.masters, strict=True)
            for parameter in parameters
            if parameter._hp_mapping is not None  # else all of it is on other ranks
        ]

    def _fragment(self, parameter: Any, master: Tensor) -> Fragment:
        in_master, in_parameter = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
        views = _views(self.zero.optimizer, master, in_master.start, in_master.numel)
        return Fragment(self.names[id(parameter)], in_parameter.start, *views)

    def adam_states(self) -> list[dict[str, Any]]:
        return [adam_state(self.zero.optimizer, master) for master in self.masters]

    def publish_masters(self) -> None:
        """Copy the masters to the compute weights, gather them, and link the moments again."""
        self.zero.update_lp_params()
        self.zero._hp_optimizer_states_linked = False
        self.adam_states()  # linking needs them to exist
        self.zero._lazy_init_hp_params_optimizer_state()


class FullyPartitionedState:
    """Stage 3: each parameter is cut into equal ranges, one per rank, the last one padded.

    Args:
        names: ``id(parameter)`` to canonical name.
        shapes: canonical name to shape of the whole parameter.
    """

    def __init__(self, engine: Any, names: dict[int, str], shapes: dict[str, torch.Size]) -> None:
        self.zero = engine.optimizer
        self.names, self.shapes = names, shapes
        self.rank = torch.distributed.get_rank()

    def fragments(self) -> list[Fragment]:
        fragments = []
        for parameter in (parameter for parameters in self.zero.fp16_groups for parameter in parameters):
            name = self.names[id(parameter)]
            group, at, partition_numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = self.rank * partition_numel
            n = min(partition_numel, self.shapes[name].numel() - start)
            if n > 0:  # else this rank has nothing but padding
                master = self.zero.fp32_partitioned_groups_flat[group]
                fragments.append(Fragment(name, start, *_views(self.zero.optimizer, master, at, n)))
        return fragments

    def adam_states(self) -> list[dict[str, Any]]:
        return [adam_state(self.zero.optimizer, master) for master in self.zero.fp32_partitioned_groups_flat]

    def publish_masters(self) -> None:
        """Drop gathered weights, copy the masters into the partitions, and gather the persistent weights again."""
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


def _views(optimizer: torch.optim.Optimizer, master: Tensor, start: int, n: int) -> list[Tensor]:
    """Return a range of a master and of its two moments."""
    state = adam_state(optimizer, master)
    return [tensor.detach().narrow(0, start, n) for tensor in (master, state["exp_avg"], state["exp_avg_sq"])]

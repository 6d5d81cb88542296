"""Give access to the masters (tensors that the optimizer updates) and the optimizer state under ZeRO-1 to ZeRO-3.

This file uses private names of DeepSpeed 0.19.8. If a new release changes them, tests fail.
"""

from typing import Any

import torch

from pipeline.backends.local_state import LocalState
from pipeline.backends.ranges import Range
from pipeline.model.parameter_state import StateNames


class PartitionedState(LocalState):
    """The masters (tensors that the optimizer updates) and the optimizer state under ZeRO-1 and ZeRO-2.

    DeepSpeed concatenates the parameters of each parameter group. Each rank has one range of the result.

    Args:
        names: maps ``id(parameter)`` to the parameter's canonical name.
    """

    def __init__(self, engine: Any, names: dict[int, str], state_names: StateNames) -> None:
        self.zero = engine.optimizer
        self.names = names
        if hasattr(self.zero, "fp32_groups_flat_partition"):  # BF16_Optimizer
            self.groups, masters = self.zero.bf16_groups, self.zero.fp32_groups_flat_partition
        else:
            self.groups, masters = self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups
        super().__init__(self.zero.optimizer, masters, state_names)

    def ranges(self) -> list[Range]:
        ranges = []
        for parameters, master in zip(self.groups, self.masters, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:  # otherwise the whole parameter is on other ranks
                    name, start = self.names[id(parameter)], mapping.lp_fragment_address.start
                    held = mapping.hp_fragment_address
                    ranges.append(Range(name, start, master, held.start, held.numel))
        return ranges

    def publish_masters(self) -> None:
        """Copy the masters to the weights that the model computes with, on all ranks.

        This also updates DeepSpeed's references to the optimizer state.
        """
        self.zero.update_lp_params()
        self.zero._hp_optimizer_states_linked = False
        self.create_states()  # missing states must exist before they are linked
        self.zero._lazy_init_hp_params_optimizer_state()


class FullyPartitionedState(LocalState):
    """The masters (tensors that the optimizer updates) and the optimizer state under ZeRO-3.

    DeepSpeed divides each parameter into equal ranges, one per rank. The last range is padded.

    Args:
        names: maps ``id(parameter)`` to the parameter's canonical name.
    """

    def __init__(self, engine: Any, names: dict[int, str], state_names: StateNames) -> None:
        self.zero = engine.optimizer
        self.names = names
        super().__init__(self.zero.optimizer, self.zero.fp32_partitioned_groups_flat, state_names)

    def ranges(self) -> list[Range]:
        ranges = []
        for parameter in (parameter for parameters in self.zero.fp16_groups for parameter in parameters):
            group, at, partition_numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = torch.distributed.get_rank() * partition_numel
            n = min(partition_numel, parameter.ds_numel - start)
            if n > 0:  # otherwise this rank has only padding
                ranges.append(Range(self.names[id(parameter)], start, self.masters[group], at, n))
        return ranges

    def publish_masters(self) -> None:
        """Copy the master weights to this rank's shards of the weights that the model computes with.

        All gathered weights are freed. The small parameters that DeepSpeed always keeps gathered are gathered again.
        With ZeRO++ hpZ, the outdated secondary shards are deleted. The next forward pass creates new ones.
        """
        self.zero._partition_all_parameters()
        self.zero.invalidate_secondary_tensor()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

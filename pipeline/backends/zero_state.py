"""Access the fp32 masters and moments of ZeRO stages 1 to 3. Only this file uses private names of DeepSpeed 0.19.8.

The tests save and resume with every stage, so they fail if a release of DeepSpeed changes these names.
"""

from typing import Any

import torch

from pipeline.backends.optimizer_state import Fragment, OptimizerState


class PartitionedState(OptimizerState):
    """Stages 1 and 2: the parameters of each group are concatenated, and each rank has one range of the elements.

    Args:
        names: maps ``id(parameter)`` to the canonical name of the parameter.
    """

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        self.zero = engine.optimizer
        self.names = names
        if hasattr(self.zero, "fp32_groups_flat_partition"):  # BF16_Optimizer
            self.groups, masters = self.zero.bf16_groups, self.zero.fp32_groups_flat_partition
        else:
            self.groups, masters = self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups
        super().__init__(self.zero.optimizer, masters)

    def fragments(self) -> list[Fragment]:
        fragments = []
        for parameters, master in zip(self.groups, self.masters, strict=True):
            views = self.views(master)
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:  # otherwise the whole parameter is on other ranks
                    start, n = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                    ranges = [view[start : start + n] for view in views]
                    fragments.append(Fragment(self.names[id(parameter)], mapping.lp_fragment_address.start, *ranges))
        return fragments

    def publish_masters(self) -> None:
        """Copy the masters to the weights that the model computes with, and gather these weights from all ranks.

        DeepSpeed keeps a reference from each parameter to its moments. This call also updates these references.
        """
        self.zero.update_lp_params()
        self.zero._hp_optimizer_states_linked = False
        self.adam_states()  # creates missing states, which must exist before they are linked
        self.zero._lazy_init_hp_params_optimizer_state()


class FullyPartitionedState(OptimizerState):
    """Stage 3: each parameter is divided into equal ranges, one per rank. The last range is padded.

    Args:
        names: maps ``id(parameter)`` to the canonical name of the parameter.
    """

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        self.zero = engine.optimizer
        self.names = names
        super().__init__(self.zero.optimizer, self.zero.fp32_partitioned_groups_flat)

    def fragments(self) -> list[Fragment]:
        fragments = []
        views = [self.views(master) for master in self.masters]
        for parameter in (parameter for parameters in self.zero.fp16_groups for parameter in parameters):
            group, at, partition_numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = torch.distributed.get_rank() * partition_numel
            n = min(partition_numel, parameter.ds_numel - start)
            if n > 0:  # otherwise this rank has only padding
                ranges = [view[at : at + n] for view in views[group]]
                fragments.append(Fragment(self.names[id(parameter)], start, *ranges))
        return fragments

    def publish_masters(self) -> None:
        """Copy the masters to this rank's shards of the weights that the model computes with.

        Weights that are gathered on this rank are freed first. DeepSpeed always keeps some small parameters gathered.
        These *persistent* parameters are gathered again at the end.
        """
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

"""Train with FSDP2 (``fully_shard``), which shards weights, gradients and moments over the ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from pipeline.backends.compilation import compile_blocks
from pipeline.backends.fsdp_collectives import AllGather, Bf16ReduceScatter, ReduceScatter
from pipeline.backends.local_state import LocalState, ParameterState
from pipeline.backends.torch_native import TorchBackend
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2
from pipeline.model.parameter_state import StateNames
from pipeline.model.precision import AutocastModel
from pipeline.model.recomputation import recompute_blocks

_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class ShardedState(ParameterState):
    """The training state under FSDP2. The masters (tensors that the optimizer updates) are shards of the parameters."""

    def __init__(
        self,
        compute: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, Tensor],
        state_names: StateNames,
    ) -> None:
        super().__init__(optimizer, parameters, state_names)
        self.compute = compute

    def publish_masters(self) -> None:
        """Free the gathered weights, because the optimizer has changed the masters.

        The next forward pass gathers the new weights.
        """
        for module in self.compute.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class FsdpBackend(TorchBackend):
    """The backend for FSDP2."""

    label = "FSDP2"

    def __init__(self, model: GPT2, config: Config, world: World) -> None:
        super().__init__(model, _wrap(model, config, world), config, world)
        self._reshards_blocks = config.backend.fsdp.reshard_after_forward
        self._copies = world.size // self.ranks_per_copy

    def _create_state(self) -> LocalState:
        return ShardedState(self.compute, self.optimizer, self.parameters, self.state_names)

    def _gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        """Reduce gradients only if ``enabled``.

        If not ``enabled``, the root group keeps its gathered weights after the backward pass. Blocks keep theirs
        only if ``reshard_after_forward`` is false. Therefore, the peak memory does not grow.
        """
        assert isinstance(self.compute, FSDPModule)
        self.compute.set_requires_gradient_sync(enabled)
        self.compute.set_reshard_after_backward(enabled, recurse=not self._reshards_blocks)
        return nullcontext()

    def describe(self) -> str:
        groups = f", {self._copies} shard groups of {self.ranks_per_copy}" if self._copies > 1 else ""
        return super().describe() + groups


def _wrap(model: GPT2, config: Config, world: World) -> nn.Module:
    """Set up the recomputation of activations, compile the blocks and the output layer, and shard the model.

    Each block is one FSDP2 group. All other weights form the root group, so ``wte`` and ``lm_head`` stay tied. The root
    group stays gathered between the forward and the backward pass. Compiled graphs contain no collectives.
    """
    recompute_blocks(model)
    if config.run.compiles:
        compile_blocks(model)
    mesh = _create_mesh(world, config.backend.ranks_per_copy(world.size))
    copies = None
    if config.backend.reduces_in_bf16(world.size) and mesh.ndim == 2:
        # With both dimensions, FSDP2 would send fp32 gradients between the copies. Here, a hook sends bf16 gradients.
        mesh, copies = mesh["shard"], mesh.get_group("replicate")
    policy = _BF16 if config.run.precision == "bf16" else MixedPrecisionPolicy()
    reshard = config.backend.fsdp.reshard_after_forward
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    root = AutocastModel(model, config.run.precision, world.device)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    root.to_empty(device=world.device)
    model.tie_weights()
    for module in root.modules():
        if isinstance(module, FSDPModule):
            _replace_collectives(module, config, world)
            if copies is not None:
                module.set_all_reduce_hook(partial(_average_in_bf16, group=copies))
    if world.device.type == "cpu":  # on a GPU, the host runs ahead and starts the next gather early
        for module, following in pairwise([root, *model.h]):
            module.set_modules_to_forward_prefetch([following])
    return root


def _replace_collectives(module: FSDPModule, config: Config, world: World) -> None:
    """Use faster collectives on a CPU, and reduce gradients in bf16 if the config selects it."""
    reduce_scatter: Callable[..., Any] = dist.reduce_scatter_tensor
    if world.device.type == "cpu":
        reduce_scatter = ReduceScatter()
        module.set_custom_all_gather(AllGather())  # type: ignore[arg-type]
        module.set_custom_reduce_scatter(reduce_scatter)  # type: ignore[arg-type]
    if config.backend.reduces_in_bf16(world.size):
        module.set_custom_reduce_scatter(Bf16ReduceScatter(reduce_scatter))  # type: ignore[arg-type]


def _average_in_bf16(gradients: Tensor, group: dist.ProcessGroup) -> None:
    """Replace the gradients by their mean over the ranks of a group. The ranks send and sum bf16 values."""
    sent = gradients.to(torch.bfloat16).div_(group.size())
    dist.all_reduce(sent, group=group)
    gradients.copy_(sent)


def _create_mesh(world: World, shard_group_size: int) -> DeviceMesh:
    """Return the mesh (shard,), or (replicate, shard) if the ranks hold several copies of the weights."""
    copies = world.size // shard_group_size
    if copies == 1:
        return init_device_mesh(world.device.type, (world.size,))
    return init_device_mesh(world.device.type, (copies, shard_group_size), mesh_dim_names=("replicate", "shard"))

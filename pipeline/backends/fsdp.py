"""FSDP2 (``fully_shard``): each block's weights, gradients and moments divided among the ranks."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from pipeline.backends.gloo_collectives import AllGather, ReduceScatter
from pipeline.backends.torch_native import TorchBackend
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2
from pipeline.model.precision import AutocastModel


class FsdpBackend(TorchBackend):
    """See :class:`pipeline.backends.base.Backend`."""

    label = "FSDP2"

    def __init__(self, model: GPT2, config: Config, world: World) -> None:
        self.policy = _mixed_precision(config.run.precision)
        self.root = _shard(model, config, world, self.policy)
        super().__init__(model, config, world)

    @property
    def compute(self) -> nn.Module:
        """The sharded root."""
        return self.root

    def accumulate(self, tokens: Tensor, targets: Tensor, loss_weight: Tensor | float, *, is_last: bool) -> Tensor:
        """See :meth:`Backend.accumulate`."""
        assert isinstance(self.root, FSDPModule)
        self.root.set_requires_gradient_sync(is_last)
        loss = self.root(tokens, targets)
        self._backward(loss, loss_weight)
        return loss.detach()

    def dtypes(self) -> dict[str, torch.dtype]:
        """See :meth:`Backend.dtypes`."""
        fragment = self.fragments()[0]
        return {
            "master weights": fragment.weight.dtype,
            "compute weights": self.policy.param_dtype or fragment.weight.dtype,
            "gradient accumulation": self.policy.reduce_dtype or fragment.weight.dtype,
            "moments": fragment.exp_avg.dtype,
        }


def _mixed_precision(precision: str) -> MixedPrecisionPolicy:
    if precision == "bf16":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def _shard(model: GPT2, config: Config, world: World, policy: MixedPrecisionPolicy) -> nn.Module:
    """Shard block by block, then the embeddings and the last LayerNorm with the root.

    ``wte`` and ``lm_head`` share one group, so the tie holds through gather and reshard. That group is needed at the
    end of the forward and at the beginning of the backward pass, so between them it stays gathered.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    reshard = config.backend.fsdp.reshard_after_forward
    for block in model.h:
        if config.run.compile is True:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    if config.run.compile is True:
        model.lm_head.compile(dynamic=False)
    root = AutocastModel(model, config.run.precision, world.device)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if world.device.type == "cpu":
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(AllGather())  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(ReduceScatter())  # type: ignore[arg-type]
    return root

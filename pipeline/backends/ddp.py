"""DistributedDataParallel: whole fp32 weights on every rank, gradients all-reduced once a step.

One process needs no wrapper, and has none: it is the plain model, on any device that torch knows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.backends.torch_native import TorchBackend
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2
from pipeline.model.precision import replicated_compute


class DdpBackend(TorchBackend):
    """See :class:`pipeline.backends.base.Backend`."""

    label = "DDP"
    replicated = True

    def __init__(self, model: GPT2, config: Config, world: World) -> None:
        super().__init__(model.to(world.device), config, world)
        self.precision = config.run.precision
        self.module: nn.Module = replicated_compute(model, config.run.precision, world.device)
        if world.size > 1:
            self.module = DistributedDataParallel(
                self.module,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                bucket_cap_mb=config.backend.ddp.bucket_cap_mb,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        if config.run.compile is True:
            self.module.compile(dynamic=False)

    @property
    def compute(self) -> nn.Module:
        """The DDP wrapper, or the model of a single process."""
        return self.module

    def accumulate(self, tokens: Tensor, targets: Tensor, loss_weight: Tensor | float, *, is_last: bool) -> Tensor:
        """See :meth:`Backend.accumulate`."""
        with nullcontext() if is_last else self._without_sync():
            loss = self.module(tokens, targets)
            self._backward(loss, loss_weight)
        return loss.detach()

    def _clear_gradients(self) -> None:
        """DDP's gradients are parts of its buckets. Let go, the next micro-step would allocate them beside these."""
        self.optimizer.zero_grad(set_to_none=not isinstance(self.module, DistributedDataParallel))

    def _without_sync(self) -> AbstractContextManager[None]:
        """Around forward *and* backward: DDP reads its flag in the forward pass."""
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()

    def dtypes(self) -> dict[str, torch.dtype]:
        """See :meth:`Backend.dtypes`."""
        fragment = self.fragments()[0]
        return {
            "master weights": fragment.weight.dtype,
            "compute weights": torch.bfloat16 if self.precision == "bf16" else fragment.weight.dtype,
            "gradient accumulation": fragment.weight.dtype,
            "moments": fragment.exp_avg.dtype,
        }

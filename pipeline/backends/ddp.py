"""Train with DDP. Every rank has all fp32 weights. The gradients are all-reduced once per step.

If a run has a single process, the model is not wrapped in DDP. Such a run works on every device that torch supports.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.backends.compilation import compile_blocks, compiles_blocks
from pipeline.backends.torch_native import TorchBackend
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2, place_model
from pipeline.model.precision import replicated_compute
from pipeline.model.recomputation import recompute_blocks


class DdpBackend(TorchBackend):
    """The backend for DDP, and for a run with a single process."""

    label = "DDP"

    def __init__(self, model: GPT2, config: Config, world: World) -> None:
        place_model(model, world.device)
        super().__init__(model, _wrap(model, config, world), config, world)
        self._accumulates = False  # whether a step has had more than one micro-step

    def _gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        """Return DDP's ``no_sync`` if ``enabled`` is False. DDP reads this setting in the forward pass."""
        if enabled or not isinstance(self.compute, DistributedDataParallel):
            return nullcontext()
        self._accumulates = True
        return self.compute.no_sync()

    def _run_backward_pass(self, loss: Tensor) -> None:
        with self.step_clock.backward_pass(loss):
            super()._run_backward_pass(loss)

    def _clear_gradients(self) -> None:
        """Release the gradients. If steps have several micro-steps, set them to zero, because DDP adds to its buckets.

        If a step has a single micro-step, DDP copies each new gradient into its bucket. This is faster than an addition
        to zeros.
        """
        self.optimizer.zero_grad(set_to_none=not self._accumulates)


def _wrap(model: GPT2, config: Config, world: World) -> nn.Module:
    recompute_blocks(model)
    compute: nn.Module = replicated_compute(model, config.run.precision, world.device)
    if world.size > 1:
        compute = DistributedDataParallel(
            compute,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            bucket_cap_mb=config.backend.ddp.bucket_cap_mb,
            gradient_as_bucket_view=True,
        )
        if config.backend.reduces_in_bf16(world.size):
            compute.register_comm_hook(None, _average_in_bf16)
    if config.run.compiles:
        if compiles_blocks(world):
            compile_blocks(model)
        else:
            compute.compile(dynamic=False)
    return compute


def _average_in_bf16(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Return the mean of a bucket over all ranks. The ranks send and sum bf16 values.

    DDP accepts torch's own ``bf16_compress_hook`` only on GPUs.
    """
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(sent, async_op=True)
    return work.get_future().then(lambda _: gradients.copy_(sent))

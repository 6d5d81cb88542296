"""All-gather and reduce-scatter for FSDP2 on CPUs, with fewer copies than gloo's own.

Gloo gathers into a buffer that is then copied, and implements reduce-scatter as an all-reduce of everything. The
interface is that of ``FSDPModule.set_custom_all_gather``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class _Buffers:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory to send from or to receive into."""
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Buffers):
    """An all-gather in which each rank broadcasts its shard straight into the others' output."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather (n,) of each rank into (ranks * n,), in the order of the ranks."""
        assert not async_op, "FSDP2 asks for async_op only where streams do not order the work"
        shards = output_tensor.chunk(group.size())
        own = shards[group.rank()]
        if not own.is_set_to(input_tensor):  # FSDP2 may have it in place
            own.copy_(input_tensor)
        broadcasts = [
            dist.broadcast(shard, group=group, group_src=rank, async_op=True) for rank, shard in enumerate(shards)
        ]
        for broadcast in broadcasts:
            broadcast.wait()


class ReduceScatter(_Buffers):
    """A reduce-scatter in which each rank receives its shard from all others and sums in the order of the ranks."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Reduce (ranks * n,) of each rank by sum or average, and keep this rank's (n,)."""
        assert not async_op
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG), op
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())

"""All-gather and reduce-scatter for FSDP on CPUs, which copy less than gloo's own.

Gloo gathers into a buffer that is then copied, and reduce-scatters by an all-reduce of everything. See
``FSDPModule.set_custom_all_gather`` for the interface.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class _Buffers:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory to send from or to receive into."""
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Buffers):
    """Each rank broadcasts its part, straight to where the others want it."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather (n,) of each rank into (ranks * n,), in the order of the ranks; finished on return."""
        assert not async_op, "FSDP asks for it only where streams do not order the work"
        parts = output_tensor.chunk(group.size())
        own = parts[group.rank()]
        if not own.is_set_to(input_tensor):  # FSDP has it in place
            own.copy_(input_tensor)
        under_way = [
            dist.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(parts)
        ]
        for work in under_way:
            work.wait()


class ReduceScatter(_Buffers):
    """Each rank gets its part of all others and adds them up, in the order of the ranks."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Sum or average of (ranks * n,), of which this rank gets its (n,); finished on return."""
        assert not async_op
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG), op
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())

"""Define collectives that replace those of FSDP2: faster ones on a CPU, and a reduction in bf16."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Collective:
    """The base class of collectives that replace those of FSDP2."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a new tensor for the input or output of the collective."""
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Collective):
    """An all-gather for Gloo. Each rank sends its shard to all other ranks, and receives their shards.

    Gloo's own all-gather is slower, because it copies its result from a buffer.
    """

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:
        """Gather the inputs (n,) of all ranks into the output (ranks * n,), in the order of the ranks.

        The result is asynchronous for every ``async_op``. FSDP2 waits for it before it reads the output.
        """
        return _exchange([input_tensor] * group.size(), output_tensor.chunk(group.size()), group)


class ReduceScatter(_Collective):
    """A reduce-scatter for Gloo. Each rank receives all inputs for its shard, and adds them in the order of ranks.

    Gloo's own reduce-scatter is slower, because it all-reduces the whole input.
    """

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Sum or average the inputs (ranks * n,) of all ranks. Write this rank's shard (n,) into ``output_tensor``."""
        assert not async_op
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG), op
        sent = input_tensor.chunk(group.size())
        received = [chunk if rank == group.rank() else torch.empty_like(chunk) for rank, chunk in enumerate(sent)]
        _exchange(sent, received, group).wait()
        torch.add(received[0], received[1], out=output_tensor)
        for tensor in received[2:]:
            output_tensor.add_(tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())


class Bf16ReduceScatter(_Collective):
    """A reduce-scatter of fp32 gradients in which the ranks send and sum bf16 values.

    ``MixedPrecisionPolicy.reduce_dtype`` is not used for this, because FSDP2 would also accumulate gradients in bf16.
    """

    def __init__(self, reduce_scatter: Callable[..., Any]) -> None:
        self.reduce_scatter = reduce_scatter

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Sum or average the inputs (ranks * n,) of all ranks. Write this rank's shard (n,) into ``output_tensor``."""
        assert not async_op
        reduced = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        self.reduce_scatter(reduced, input_tensor.to(torch.bfloat16), group=group, op=op)
        output_tensor.copy_(reduced)


class _Transfers(dist.Work):
    """Several transfers. To wait for them means to wait for each of them."""

    def __init__(self, transfers: Sequence[dist.Work]) -> None:
        super().__init__()
        self.transfers = transfers

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until all transfers are done."""
        return all([transfer.wait() for transfer in self.transfers])


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup) -> dist.Work:
    """Send one tensor to each rank, and receive one from each rank, all at the same time.

    Gloo's all-to-all is not used, because it often sends and receives one after the other.
    """
    own = group.rank()
    if not received[own].is_set_to(sent[own]):  # FSDP2 may have written the shard into the output already
        received[own].copy_(sent[own])
    others = [rank for rank in range(group.size()) if rank != own]
    if not others:
        return _Transfers([])
    record = dist.barrier(group=group, async_op=True)  # torch's flight recorder does not record transfers of gloo
    receive = [dist.P2POp(dist.irecv, received[rank], group=group, group_peer=rank) for rank in others]
    send = [dist.P2POp(dist.isend, sent[rank], group=group, group_peer=rank) for rank in others]
    return _Transfers([*dist.batch_isend_irecv(receive + send), record])

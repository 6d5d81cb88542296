"""Describe which elements of which parameters an optimizer's tensors contain on this rank."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Range:
    """A contiguous range of one parameter's elements in a *master*, which is an fp32 tensor that the optimizer updates.

    If every rank holds all weights, a range is a whole parameter. Under FSDP2, a range consists of whole rows. Under
    ZeRO-1 to ZeRO-3, it can begin and end at any element. A range does not contain padding for alignment.
    """

    name: str  # the canonical name of the parameter, as in GPT2.named_parameters()
    start: int  # the first element, counted in the flattened parameter
    master: Tensor
    offset: int  # the first element, counted in this rank's elements of the flattened master
    length: int  # the number of elements, which can be 0

    @property
    def stop(self) -> int:
        """The index after the last element, counted in the flattened parameter."""
        return self.start + self.length

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of this range, (length,), in a tensor that has the same shape and sharding as the master."""
        return local_elements(tensor)[self.offset : self.offset + self.length]


def local_elements(tensor: Tensor) -> Tensor:
    """Return a detached, one-dimensional view of a tensor's elements on this rank."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)

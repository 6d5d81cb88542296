"""Describe which elements of which parameters an optimizer's tensors contain on this rank."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Range:
    """A contiguous range of one parameter's elements in a master: the fp32 tensor that the optimizer updates.

    On a replicated backend, a range is a whole parameter. Under FSDP2 a range consists of whole rows, and under ZeRO it
    can be any range. Padding for alignment is not part of a range.
    """

    name: str  # the canonical name of the parameter, as in GPT2.named_parameters()
    start: int  # the first element, counted in the flattened parameter
    master: Tensor
    offset: int  # the first element, counted in this rank's elements of the flattened master
    length: int  # the number of elements, which can be 0

    @property
    def stop(self) -> int:
        """The element after the last element, counted in the flattened parameter."""
        return self.start + self.length

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of the range's elements, (length,), in a tensor with the layout of the master."""
        return local_elements(tensor)[self.offset : self.offset + self.length]


def local_elements(tensor: Tensor) -> Tensor:
    """Return a flat view of a tensor's elements on this rank, without gradients."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)

"""Describe the elements of parameters that this rank updates: ranges of elements, in the tensors of the optimizer."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Range:
    """A range of elements of one flattened parameter, and the place of these elements in a *master* on this rank.

    A master is an fp32 tensor that the optimizer updates.

    If every rank holds all weights, a range is a whole parameter. Under FSDP2, a range consists of whole rows. Under
    ZeRO-1 to ZeRO-3, a range can begin and end at any element. Padding for alignment does not belong to any range.
    """

    name: str  # the canonical name of the parameter, as in GPT2.named_parameters()
    start: int  # the first element, counted in the flattened parameter
    master: Tensor
    offset: int  # the first element, counted in this rank's elements of the flattened master
    length: int  # the number of elements, which can be 0

    @property
    def stop(self) -> int:
        """Return the index after the last element of the range, in the flattened parameter."""
        return self.start + self.length

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of this range's elements in ``tensor``, shape (length,).

        Args:
            tensor: ``master``, or a tensor with the shape and the sharding of ``master``, such as its gradient.
        """
        return local_elements(tensor)[self.offset : self.offset + self.length]


def local_elements(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor that are on this rank, as a detached view with one dimension."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)

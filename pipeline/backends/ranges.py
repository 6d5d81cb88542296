"""Describe which elements of the parameters this rank updates."""

from dataclasses import dataclass

from torch import Tensor

from pipeline.backends.dtensors import local_shard


@dataclass(frozen=True)
class Range:
    """A range of one flattened parameter, and its place in a *master* (an fp32 tensor that the optimizer updates).

    Under FSDP2, a range consists of whole rows. Under ZeRO-1 to ZeRO-3, a range can begin and end at any element.
    Under the other backends, a range is a whole parameter. Padding for alignment belongs to no range.
    """

    name: str  # the canonical name of the parameter, as in GPT2.named_parameters()
    start: int  # the first element, counted in the flattened parameter
    master: Tensor
    offset: int  # the first element, counted in this rank's elements of the flattened master
    length: int  # the number of elements, which can be 0

    @property
    def stop(self) -> int:
        """Return the index after the range's last element, in the flattened parameter."""
        return self.start + self.length

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of this range's elements in ``tensor``, shape (length,).

        Args:
            tensor: this range's ``master``, or a tensor with the shape and sharding of ``master``, such as its
                gradient.
        """
        return local_elements(tensor)[self.offset : self.offset + self.length]


def local_elements(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor on this rank, as a detached view with one dimension."""
    return local_shard(tensor).detach().view(-1)

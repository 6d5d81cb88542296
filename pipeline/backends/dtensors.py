"""Recognize DTensors, the sharded tensors of FSDP2.

Importing DTensor takes half a second. Only FSDP2 needs it, so this module does not import it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # a DTensor exists only after this import
    dtensor = getattr(module, "DTensor", None)  # missing while another thread imports the module
    return dtensor is not None and isinstance(tensor, dtensor)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor. Return any other tensor unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor

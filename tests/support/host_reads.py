"""Count the operations for which the host would wait for a GPU. They are the same operations on a CPU."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

#: Reading a tensor (``item``, ``float``, ``bool``), ``torch.tensor(number, device=...)``, indexing with a mask.
WAITS = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class HostReads(TorchDispatchMode):
    """Records the operations in the ``with`` block for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() in WAITS:
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))

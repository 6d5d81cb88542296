"""How many bytes of tensors are alive, operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations inside this mode make, until they are freed.

    Works on real tensors and on fake ones. What a kernel allocates and frees within itself is not seen.

    Args:
        after_operation: called after each operation, when its results are counted.
        is_apart: tensors that ``apart`` counts, beside ``total``, which counts all.
        sums_in_place: sums that come in place of their first term. Autograd adds gradients so, but not under a mode.
    """

    def __init__(
        self,
        after_operation: Callable[[], None] = lambda: None,
        is_apart: Callable[[Tensor], bool] = lambda _: False,
        sums_in_place: Callable[[Tensor], bool] = lambda _: False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0  # bytes
        self.apart = 0  # bytes
        self._after_operation = after_operation
        self._is_apart = is_apart
        self._sums_in_place = sums_in_place
        self._counted: dict[int, tuple[int, int]] = {}  # storage -> bytes in total, bytes apart
        self._left_out: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor and self._sums_in_place(result):
            self._forget(args[0].untyped_storage()._cdata)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self._after_operation()
        return result

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these from now on, although operations make them or views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._forget(storage._cdata)
            self._left_out.add(storage._cdata)
            weakref.finalize(storage, self._left_out.discard, storage._cdata)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._counted or key in self._left_out:
            return
        size = storage.nbytes()
        apart = size if self._is_apart(tensor) else 0
        self._counted[key] = size, apart
        self.total += size
        self.apart += apart
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, apart = self._counted.pop(key, (0, 0))
        self.total -= size
        self.apart -= apart

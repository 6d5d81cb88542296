"""Define optimizers that do not import torch's compiler, because this import takes a second.

Wrappers for torch.compile around some methods of torch's optimizers import the compiler. The classes of this file use
these methods without the wrappers, so a compiled function must not call them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

#: torch's wrappers that import the compiler, by the name of the inner function: ``_use_grad_for_differentiable`` and
#: ``_disable_dynamo``.
_WRAPPERS = ("_use_grad", "inner")


def without_compiler_wrappers(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method without its outer wrappers for torch.compile. Other wrappers stay."""
    return inspect.unwrap(method, stop=lambda outer: outer.__code__.co_name not in _WRAPPERS)


class EagerOptimizer(torch.optim.Optimizer):
    """The base class of torch's optimizers, without the wrappers for torch.compile."""

    add_param_group = without_compiler_wrappers(torch.optim.Optimizer.add_param_group)
    zero_grad = without_compiler_wrappers(torch.optim.Optimizer.zero_grad)


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """torch's AdamW, without the wrappers for torch.compile."""

    step = torch.no_grad()(without_compiler_wrappers(torch.optim.AdamW.step))

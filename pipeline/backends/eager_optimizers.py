"""Define optimizers that do not import torch's compiler, because this import takes a second.

Wrappers for torch.compile around some methods of torch's optimizers import the compiler. The classes of this file use
these methods without the wrappers, so a compiled function must not call them.
"""

import inspect

import torch


class EagerOptimizer(torch.optim.Optimizer):
    """The base class of torch's optimizers, without the wrappers for torch.compile."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """torch's AdamW, without the wrappers for torch.compile."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

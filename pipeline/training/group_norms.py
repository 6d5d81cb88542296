"""Measure the gradient norm, the weight norm and the update ratio of each layer group."""

import math

import torch
from torch import Tensor

from pipeline.backends.base import Backend
from pipeline.config.schema import OptimizerConfig
from pipeline.distributed.world import World
from pipeline.hardware.device import summing_dtype
from pipeline.model.parameter_state import EXP_AVG, MOMENTUM

_PIECE_ELEMENTS = 1 << 20  # 8 MiB in fp64

#: The groups of modules of a block that do not have their own group.
_BLOCK_GROUPS = {"ln_1": "attn", "ln_2": "mlp"}


def layer_group(name: str) -> str:
    """Return the layer group of a parameter, such as ``embeddings``, ``ln_f``, ``h.0.attn`` or ``h.0.mlp``.

    The groups ``attn`` and ``mlp`` include the LayerNorm before them.

    Args:
        name: the canonical name, such as ``h.0.attn.c_attn.weight``.
    """
    first, *rest = name.split(".")
    if first == "h":
        return f"h.{rest[0]}.{_BLOCK_GROUPS.get(rest[1], rest[1])}"
    return "embeddings" if first in ("wte", "wpe") else first


class GroupNorms:
    """Measures the gradient norm, the weight norm and the update ratio of each layer group for one step.

    Create an object just before the step. The constructor copies this rank's weights and first moments. Call
    ``measure`` after the step.

    Backends keep gradients in different places. Therefore, this class computes the gradients from AdamW's first moment
    or Muon's momentum: ``new = beta * old + (1 - beta) * gradient``.
    """

    def __init__(self, backend: Backend, config: OptimizerConfig, world: World) -> None:
        self._backend = backend
        self._world = world
        self._betas = {EXP_AVG: config.betas[0], MOMENTUM: config.muon.momentum}
        self._groups = list(dict.fromkeys(layer_group(name) for name in backend.parameter_shapes))
        self._before = [(f.weight.clone(), f.state[self._moment(f.state)].clone()) for f in backend.fragments()]

    def measure(self, grad_norm: float) -> dict[str, float]:
        """Return the norms of every layer group, or an empty dict if ``grad_norm`` is not finite.

        Every rank must call this.

        Args:
            grad_norm: the global gradient norm, unscaled and before clipping. The gradient norms of the groups are
                scaled to match this norm.

        Returns:
            Three values per group: ``layer_grad_norm/GROUP``, ``layer_weight_norm/GROUP`` (after the step) and
            ``layer_update_ratio/GROUP`` (norm of the change / norm of the weights before the step).
        """
        if not math.isfinite(grad_norm):
            return {}
        sums = self._sums_of_squares()
        if self._backend.ranks_per_copy > 1:
            copies = self._world.size // self._backend.ranks_per_copy
            sums = self._world.sum(sums) / copies
        gradients, weights, changes, before = sums.sqrt().cpu().double().unbind()
        share = grad_norm / max(float(gradients.square().sum().sqrt()), torch.finfo(torch.float64).tiny)
        norms = {
            "layer_grad_norm": gradients * share,
            "layer_weight_norm": weights,
            "layer_update_ratio": changes / before.clamp(min=torch.finfo(torch.float32).tiny),
        }
        return {
            f"{kind}/{group}": float(value)
            for kind, values in norms.items()
            for group, value in zip(self._groups, values, strict=True)
        }

    def _sums_of_squares(self) -> Tensor:
        """Return this rank's sums of squares per group, shape (4, groups).

        The rows are the gradients, the weights, their changes in the step, and the weights before the step.
        """
        dtype = summing_dtype(self._world.device)
        sums = torch.zeros(4, len(self._groups), dtype=dtype, device=self._world.device)
        for fragment, (old_weight, old_moment) in zip(self._backend.fragments(), self._before, strict=True):
            moment = self._moment(fragment.state)
            beta, column = self._betas[moment], self._groups.index(layer_group(fragment.name))
            tensors = (fragment.weight, old_weight, fragment.state[moment], old_moment)
            for piece in zip(*(torch.split(tensor, _PIECE_ELEMENTS) for tensor in tensors), strict=True):
                weight, before, new, old = (part.to(dtype) for part in piece)
                parts = ((new - beta * old) / (1 - beta), weight, weight - before, before)
                sums[:, column] += torch.stack([torch.dot(part, part) for part in parts]).to(sums.device)
        return sums

    def _moment(self, state: dict[str, Tensor]) -> str:
        return next(name for name in self._betas if name in state)

"""The loss on held-out token shards: a short measurement while training, and the full ``validation`` task.

Each target token is scored once, in windows of ``seq_len`` that do not overlap. Bits per byte leave out
``<|endoftext|>`` targets, which encode no bytes, so that models with different tokenizers can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_tools.shards import TokenStream
from pipeline.backends import Backend
from pipeline.config.schema import Config
from pipeline.data.datasets import TokenDataset
from pipeline.data.loader import MicroBatch, validation_batches
from pipeline.distributed.device import summing_dtype
from pipeline.distributed.world import World
from pipeline.errors import TrainingError
from pipeline.evaluation.intervals import WINDOWS, Z_95
from pipeline.evaluation.results import VALIDATION
from pipeline.model.output_layer import IGNORE_INDEX
from pipeline.model.precision import ComputeModel
from pipeline.run_folder.metrics import DATASET_LOSS_PREFIX, perplexity

PROTOCOL = "non-overlapping windows, each target scored once, mean over tokens"
TOP_K = 5


def validate(backend: Backend, datasets: Sequence[TokenDataset], config: Config, world: World) -> dict[str, float]:
    """Return the validation loss of a model in training, as keys of a row of metrics.

    Scores ``evaluation.max_batches`` batches of each data set, within ``backend.evaluation_mode()``. Collective.

    Returns:
        ``val_loss``, ``val_perplexity``, and ``val_loss_<name>`` for each data set of a mixture. Empty if the run does
        not ask for the validation task, or has no validation split.
    """
    if VALIDATION not in config.evaluation.tasks:
        return {}
    losses = {data.name: _mean_loss(backend, data.validation, config, world) for data in datasets if data.validation}
    if not losses:
        return {}
    loss = mixture_loss(losses, {data.name: data.weight for data in datasets})
    by_name = {f"{DATASET_LOSS_PREFIX}{name}": value for name, value in losses.items()} if len(datasets) > 1 else {}
    return {"val_loss": loss, "val_perplexity": perplexity(loss), **by_name}


def mixture_loss(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted mean of the losses on the data sets of a mixture; data sets without a loss do not count."""
    total = sum(weights[name] for name in losses)
    return sum(weights[name] * loss for name, loss in losses.items()) / total


def _mean_loss(backend: Backend, stream: TokenStream, config: Config, world: World) -> float:
    """Return the mean loss per target token; NaN if the mask leaves no target."""
    batch_size, max_batches = config.batch.micro_batch_size, config.evaluation.max_batches
    sums = torch.zeros(2, dtype=summing_dtype(world.device), device=world.device)
    for batch in validation_batches(stream, config.seq_len, batch_size, world.rank, world.size, max_batches):
        sums[0] += backend.evaluate(*batch.to(world.device))
        sums[1] += batch.scored_targets
    loss_sum, targets = world.sum(sums).tolist()
    return float(loss_sum / targets) if targets else math.nan


@dataclass
class _Sums:
    """Sums over targets, by position in the window, fp64 (T,)."""

    loss: Tensor
    targets: Tensor
    top1: Tensor
    top5: Tensor
    end_of_text_loss: Tensor  # scalar
    windows: Tensor  # (4,): the number of windows, and their sums of loss^2, loss * targets, targets^2

    @classmethod
    def zeros(cls, seq_len: int, device: torch.device) -> _Sums:
        dtype = summing_dtype(device)
        loss, targets, top1, top5 = torch.zeros(4, seq_len, dtype=dtype, device=device)
        rest = torch.zeros(5, dtype=dtype, device=device)
        return cls(loss, targets, top1, top5, rest[0], rest[1:])

    def over_ranks(self, world: World) -> _Sums:
        return _Sums(*(world.sum(values).cpu() for values in vars(self).values()))


def score_split(
    compute: ComputeModel, stream: TokenStream, seq_len: int, batch_size: int, world: World
) -> dict[str, Any]:
    """Return loss, perplexity, bits per byte, top-1 and top-5 accuracy, and the loss by position in the window.

    The ranks share the batches; every rank returns the same result. Collective.

    Args:
        compute: on ``world.device``, in evaluation mode.
        batch_size: sequences per forward pass and rank. It does not change the result.

    Raises:
        TrainingError: the loss is not finite, or the split has no scored target.
    """
    batches = tqdm(
        validation_batches(stream, seq_len, batch_size, world.rank, world.size),
        total=math.ceil((stream.tokens - 1) / (seq_len * batch_size * world.size)),
        desc="validation",
        unit="batch",
        leave=False,
        disable=None if world.is_main else True,  # None: shown on a terminal only
    )
    sums = _Sums.zeros(seq_len, world.device)
    _add_batches(sums, compute, batches, stream.manifest.tokenizer.end_of_text, world.device)
    return _figures(sums.over_ranks(world), stream)


@torch.no_grad()
def _add_batches(
    sums: _Sums, compute: ComputeModel, batches: Iterable[MicroBatch], end_of_text: int, device: torch.device
) -> None:
    dtype = sums.loss.dtype
    for batch in batches:
        tokens, targets = batch.to(device)
        logits = compute.logits(tokens).float()  # (B, T, V)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        losses = losses.view_as(targets).to(dtype)  # (B, T)
        scored = (targets != IGNORE_INDEX).to(dtype)  # (B, T)
        matches = (logits.topk(TOP_K, dim=-1).indices == targets.unsqueeze(-1)).to(dtype)  # (B, T, 5)
        sums.loss += losses.sum(0)
        sums.targets += scored.sum(0)
        sums.top1 += matches[..., 0].sum(0)
        sums.top5 += matches.sum((0, 2))
        sums.end_of_text_loss += losses[targets == end_of_text].sum()
        loss, count = losses.sum(1), scored.sum(1)  # (B,), by window
        sums.windows += torch.stack(
            ((count > 0).to(dtype).sum(), (loss**2).sum(), (loss * count).sum(), (count**2).sum())
        )


def _figures(sums: _Sums, stream: TokenStream) -> dict[str, Any]:
    targets = sums.targets.sum().item()
    if not targets:
        raise TrainingError(f"the split {stream.split!r} has no scored target: its mask leaves out all tokens")
    loss = sums.loss.sum().item() / targets
    if not math.isfinite(loss):
        raise TrainingError(f"the loss on the split {stream.split!r} is {loss}; the checkpoint's weights are unusable")
    text_nats = (sums.loss.sum() - sums.end_of_text_loss).item()
    by_position = (sums.loss / sums.targets).tolist()
    bounds = _loss_interval(sums, loss, targets)
    return {
        "protocol": PROTOCOL,
        "loss": loss,
        "perplexity": perplexity(loss),
        "loss_interval": bounds,
        "perplexity_interval": [perplexity(bound) for bound in bounds],
        "interval": WINDOWS,
        # The bytes of the scored tokens alone are unknown, so masked text has no bits per byte.
        "bits_per_byte": None if stream.has_mask else text_nats / math.log(2) / stream.utf8_bytes,
        "top1_accuracy": sums.top1.sum().item() / targets,
        "top5_accuracy": sums.top5.sum().item() / targets,
        "target_tokens": int(targets),
        "utf8_bytes": stream.utf8_bytes,
        "documents": stream.documents,
        "loss_by_position": [None if math.isnan(value) else value for value in by_position],
    }


def _loss_interval(sums: _Sums, loss: float, targets: float) -> list[float]:
    """Return the 95% interval of the loss as a ratio of sums over windows, from the spread of the windows."""
    windows, squared_loss, loss_by_targets, squared_targets = sums.windows.tolist()
    spread = max(squared_loss - 2 * loss * loss_by_targets + loss**2 * squared_targets, 0.0)
    half = Z_95 * math.sqrt(spread * windows / max(windows - 1, 1)) / targets
    return [loss - half, loss + half]

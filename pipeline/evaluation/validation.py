"""The loss on held-out token shards: a brief one while a model trains, and the full ``validation`` task.

Each target token is scored once, in windows of ``seq_len`` that do not overlap. Bits per byte
leaves out ``<|endoftext|>`` targets, which stand for no bytes, and so compares across tokenizers.
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
from pipeline.config.schema import Config, MixtureComponent
from pipeline.data.datasets import TokenDataset
from pipeline.data.loader import MicroBatch, validation_batches
from pipeline.distributed.device import summing_dtype
from pipeline.distributed.world import World
from pipeline.errors import TrainingError
from pipeline.evaluation.intervals import WINDOWS, Z_95
from pipeline.evaluation.results import VALIDATION
from pipeline.model.gpt2 import GPT2, IGNORE_INDEX
from pipeline.model.precision import ComputeModel, replicated_compute
from pipeline.run_folder.metrics import DATASET_LOSS_PREFIX, perplexity

PROTOCOL = "non-overlapping windows, each target scored once, mean over tokens"
TOP_K = 5


def validate(backend: Backend, parts: Sequence[TokenDataset], config: Config, world: World) -> dict[str, float]:
    """Return the validation loss of a model in training, as keys of a row of metrics.

    Scores ``evaluation.max_batches`` batches of each data set, within ``backend.evaluation_mode()``. Collective.

    Returns:
        ``val_loss``, ``val_perplexity``, and ``val_loss_<name>`` for each data set of a mixture. Empty if the run does
        not ask for the validation task, or has no validation split.
    """
    if VALIDATION not in config.evaluation.tasks:
        return {}
    losses = {part.name: _mean_loss(backend, part.validation, config, world) for part in parts if part.validation}
    if not losses:
        return {}
    loss = mixture_loss(losses, parts)
    by_name = {f"{DATASET_LOSS_PREFIX}{name}": value for name, value in losses.items()} if len(parts) > 1 else {}
    return {"val_loss": loss, "val_perplexity": perplexity(loss), **by_name}


def mixture_loss(losses: Mapping[str, float], parts: Sequence[TokenDataset] | Sequence[MixtureComponent]) -> float:
    """Return the mean of losses by data set name, weighted by the data sets' shares of the mixture.

    Data sets without a loss are left out.
    """
    weights = {part.name: part.weight for part in parts if part.name in losses}
    return sum(weight * losses[name] for name, weight in weights.items()) / sum(weights.values())


def _mean_loss(backend: Backend, stream: TokenStream, config: Config, world: World) -> float:
    """Return the mean loss per target token; NaN if the mask leaves no target."""
    sums = torch.zeros(2, dtype=summing_dtype(world.device), device=world.device)
    for batch in validation_batches(
        stream,
        config.seq_len,
        config.batch.micro_batch_size,
        world.rank,
        world.size,
        config.evaluation.max_batches,
    ):
        tokens, targets = batch.to(world.device)
        sums[0] += backend.evaluate(tokens, targets)
        sums[1] += batch.scored_targets
    loss, targets_count = world.sum(sums).tolist()
    return float(loss / targets_count) if targets_count else math.nan


@dataclass
class _Sums:
    """Sums over targets, by position in the window, fp64 (T,)."""

    loss: Tensor
    targets: Tensor
    top1: Tensor
    top5: Tensor
    end_of_text_loss: Tensor  # scalar
    windows: Tensor  # (4,): their number, and their sums of loss^2, loss * targets, targets^2

    @classmethod
    def zeros(cls, seq_len: int, device: torch.device) -> _Sums:
        dtype = summing_dtype(device)
        loss, targets, top1, top5 = torch.zeros(4, seq_len, dtype=dtype, device=device)
        empty = torch.zeros(5, dtype=dtype, device=device)
        return cls(loss, targets, top1, top5, empty[0], empty[1:])

    def over_ranks(self, world: World) -> _Sums:
        return _Sums(*(world.sum(part).cpu() for part in vars(self).values()))


def evaluate_validation(
    model: GPT2, stream: TokenStream, seq_len: int, batch_size: int, precision: str, world: World
) -> dict[str, Any]:
    """Loss, perplexity, bits per byte, top-1 and top-5 accuracy, and loss by position.

    Batches are divided among the ranks; every rank returns the same result.

    Args:
        model: on ``world.device``, in evaluation mode.
        batch_size: sequences per forward pass and rank. Does not change the result.
        precision: in which the forward pass computes.

    Raises:
        TrainingError: the loss is not finite.
    """
    compute = replicated_compute(model, precision, world.device).eval()
    batches = tqdm(
        validation_batches(stream, seq_len, batch_size, world.rank, world.size),
        total=math.ceil((stream.tokens - 1) / (seq_len * batch_size * world.size)),
        desc="validation",
        unit="batch",
        leave=False,
        disable=None if world.is_main else True,  # None: shown on a terminal only
    )
    end_of_text = stream.manifest.tokenizer.end_of_text
    sums = _score(compute, batches, seq_len, end_of_text, world).over_ranks(world)
    return _results(sums, stream)


@torch.no_grad()
def _score(compute: ComputeModel, batches: Iterable[MicroBatch], seq_len: int, end_of_text: int, world: World) -> _Sums:
    sums = _Sums.zeros(seq_len, world.device)
    for batch in batches:
        tokens, targets = batch.to(world.device)
        logits = compute.logits(tokens).float()  # (B, T, V)
        scored = targets != IGNORE_INDEX  # (B, T)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        ).view_as(targets)
        hits = logits.topk(TOP_K, dim=-1).indices == targets.unsqueeze(-1)  # (B, T, 5)
        dtype = sums.loss.dtype
        sums.loss += losses.to(dtype).sum(0)
        sums.targets += scored.to(dtype).sum(0)
        sums.top1 += hits[..., 0].to(dtype).sum(0)
        sums.top5 += hits.any(-1).to(dtype).sum(0)
        of_window, counts = losses.to(dtype).sum(1), scored.to(dtype).sum(1)  # (B,)
        sums.windows += torch.stack(
            ((counts > 0).to(dtype).sum(), (of_window**2).sum(), (of_window * counts).sum(), (counts**2).sum())
        )
        sums.end_of_text_loss += losses[targets == end_of_text].to(dtype).sum()
    return sums


def _intervals(sums: _Sums, loss: float, targets: float) -> dict[str, Any]:
    """95% intervals, by the spread of the windows around the mean loss: that of a ratio of sums over windows."""
    windows, squared_loss, loss_by_targets, squared_targets = sums.windows.tolist()
    spread = max(squared_loss - 2 * loss * loss_by_targets + loss**2 * squared_targets, 0.0)
    half = Z_95 * math.sqrt(spread * windows / max(windows - 1, 1)) / targets
    bounds = [loss - half, loss + half]
    return {
        "loss_interval": bounds,
        "perplexity_interval": [perplexity(bound) for bound in bounds],
        "interval": WINDOWS,
    }


def _results(sums: _Sums, stream: TokenStream) -> dict[str, Any]:
    targets = sums.targets.sum().item()
    if not targets:
        raise TrainingError(f"the split {stream.split!r} has no scored target: its mask spares all tokens")
    loss = sums.loss.sum().item() / targets
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss on the split {stream.split!r} is {loss}: the weights of this checkpoint are no use"
        )
    text_nats = (sums.loss.sum() - sums.end_of_text_loss).item()
    by_position = (sums.loss / sums.targets).tolist()
    return {
        "protocol": PROTOCOL,
        "loss": loss,
        "perplexity": perplexity(loss),
        **_intervals(sums, loss, targets),
        # Of masked text it is not known how many bytes the scored tokens stand for.
        "bits_per_byte": None if stream.has_mask else text_nats / math.log(2) / stream.utf8_bytes,
        "top1_accuracy": sums.top1.sum().item() / targets,
        "top5_accuracy": sums.top5.sum().item() / targets,
        "target_tokens": int(targets),
        "utf8_bytes": stream.utf8_bytes,
        "documents": stream.documents,
        "loss_by_position": [None if math.isnan(value) else value for value in by_position],
    }

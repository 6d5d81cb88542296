"""Measure the loss on the validation split.

The split is divided into windows of ``seq_len`` tokens. The windows do not overlap, so each target token is scored
once. During training, only some windows are scored.

Bits per byte can be compared between models with different tokenizers. They exclude the loss of ``<|endoftext|>``
targets, because this token encodes no bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_tools.shards.reader import TokenStream
from pipeline.backends import Backend
from pipeline.config.schema import Config
from pipeline.data.datasets import TokenDataset
from pipeline.data.loader import validation_batches
from pipeline.distributed.world import World
from pipeline.errors import TrainingError
from pipeline.evaluation.intervals import FEWEST_VALUES, TOO_FEW, WINDOWS, Z_95
from pipeline.evaluation.results import VALIDATION
from pipeline.hardware.device import summing_dtype
from pipeline.model.gpt2 import ScoringBatch
from pipeline.model.output_layer import IGNORE_INDEX
from pipeline.model.precision import ComputeModel
from pipeline.run_folder.metrics import DATASET_LOSS_PREFIX, perplexity

PROTOCOL = "non-overlapping windows, each target scored once, mean over tokens"
TOP_K = 5


def validate(
    backend: Backend,
    datasets: Sequence[TokenDataset],
    config: Config,
    world: World,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float | None]:
    """Measure the validation loss during training, on at most ``evaluation.max_batches`` batches per dataset.

    Every rank must call this function, within ``backend.evaluation_mode()``.

    Args:
        before_batch: is called on every rank before each batch.

    Returns:
        A dict with ``val_loss``, ``val_perplexity``, and one ``val_loss_<name>`` per dataset of a mixture. The dict is
        empty if the task ``validation`` is not selected, or if no dataset has a validation split.

        A loss mask can exclude all targets of a dataset. The loss of this dataset is then None, and the loss of the
        mixture does not include the dataset.
    """
    if VALIDATION not in config.evaluation.tasks:
        return {}
    losses = {
        data.name: _mean_loss(backend, data.validation, config, world, before_batch)
        for data in datasets
        if data.validation
    }
    if not losses:
        return {}
    by_name = {f"{DATASET_LOSS_PREFIX}{name}": value for name, value in losses.items()} if len(datasets) > 1 else {}
    scored = {name: value for name, value in losses.items() if value is not None}
    if not scored:
        return {"val_loss": None, "val_perplexity": None, **by_name}
    loss = mixture_loss(scored, {data.name: data.weight for data in datasets})
    return {"val_loss": loss, "val_perplexity": perplexity(loss), **by_name}


def validate_average(
    backend: Backend,
    datasets: Sequence[TokenDataset],
    config: Config,
    world: World,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float | None]:
    """Measure the validation loss of the moving averages of the weights.

    Every rank must call this function.

    Args:
        before_batch: is called on every rank before each batch.

    Returns:
        A dict with ``val_ema_loss``. The dict is empty if ``averaging.ema`` is null, if the task ``validation`` is not
        selected, or if no dataset has a validation split.
    """
    if config.averaging.ema is None or VALIDATION not in config.evaluation.tasks:
        return {}
    with backend.averaged_weights():
        losses = validate(backend, datasets, config, world, before_batch)
    return {"val_ema_loss": losses["val_loss"]} if losses else {}


def mixture_loss(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted mean of the losses on the datasets of a mixture.

    Datasets that are missing in ``losses`` are ignored.
    """
    total = sum(weights[name] for name in losses)
    return sum(weights[name] * loss for name, loss in losses.items()) / total


def _mean_loss(
    backend: Backend, stream: TokenStream, config: Config, world: World, before_batch: Callable[[], None]
) -> float | None:
    """Return the mean loss per target, or None if the mask excludes all targets."""
    batch_size, max_batches = config.batch.micro_batch_size, config.evaluation.max_batches
    sums = torch.zeros(2, dtype=summing_dtype(world.device), device=world.device)
    for batch in validation_batches(stream, config.seq_len, batch_size, world.rank, world.size, max_batches):
        before_batch()
        world.progress.pass_mark()
        sums[0] += backend(*batch.to(world.device), method="loss")
        sums[1] += batch.scored_targets
    loss_sum, targets = world.sum(sums).tolist()
    return float(loss_sum / targets) if targets else None


@torch.no_grad()
def score_split(
    compute: Backend | ComputeModel, stream: TokenStream, seq_len: int, batch_size: int, world: World
) -> dict[str, Any]:
    """Score a whole split. Return the loss, perplexity, bits per byte, top-1 and top-5 accuracy, and loss per position.

    Every rank must call this function. All ranks return the same result, for any ``batch_size``.

    Args:
        compute: the model, on ``world.device`` and in evaluation mode.
        batch_size: sequences per forward pass and rank.

    Raises:
        TrainingError: the loss is not finite, or the split has no scored target.
    """
    device, dtype = world.device, summing_dtype(world.device)
    by_position = torch.zeros(4, seq_len, dtype=dtype, device=device)
    overall = torch.zeros(5, dtype=dtype, device=device)
    for batch in tqdm(
        validation_batches(stream, seq_len, batch_size, world.rank, world.size),
        total=math.ceil((stream.tokens - 1) / (seq_len * batch_size * world.size)),
        desc="validation",
        unit="batch",
        leave=False,
        disable=None if world.is_main else True,  # None shows the bar only on a terminal
    ):
        world.progress.pass_mark()
        tokens, targets = batch.to(device)
        outputs = torch.arange(targets.numel(), device=device)
        # Unscored targets get any id of a token here. Their scores are not used.
        scores = compute(ScoringBatch(tokens, targets.flatten().clamp(min=0), outputs), method="score")
        sums = _sum_batch(scores, targets, stream.manifest.tokenizer.end_of_text, dtype)
        by_position += sums[0]
        overall += sums[1]
    return _figures(world.sum(by_position).cpu(), world.sum(overall).cpu(), stream)


def _sum_batch(scores: Tensor, targets: Tensor, end_of_text: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return sums over the targets of a batch.

    Args:
        scores: (2, B * T), the log-probability and the rank of each target.
        targets: (B, T) int64 ids. Targets that are ``IGNORE_INDEX`` do not count.

    Returns:
        By position in the window, (4, T): loss, number of targets, top-1 matches, top-5 matches.

        Overall, (5,): the loss on ``end_of_text`` targets, the number of windows, and the sums over windows of L^2, L*n
        and n^2. L is the loss of a window, and n is its number of targets.
    """
    log_probabilities, ranks = scores.to(dtype).view(2, *targets.shape)  # (B, T) each
    is_scored = targets != IGNORE_INDEX  # (B, T)
    losses, scored = torch.where(is_scored, -log_probabilities, 0.0), is_scored.to(dtype)
    top1, top5 = (torch.where(ranks < k, scored, 0.0) for k in (1, TOP_K))
    by_position = torch.stack((losses, scored, top1, top5)).sum(1)
    loss, count = losses.sum(1), scored.sum(1)  # (B,), by window
    windows = ((count > 0).to(dtype), loss**2, loss * count, count**2)
    of_end_of_text = torch.where(targets == end_of_text, losses, 0.0)
    overall = torch.stack((of_end_of_text.sum(), *(values.sum() for values in windows)))
    return by_position, overall


def _figures(by_position: Tensor, overall: Tensor, stream: TokenStream) -> dict[str, Any]:
    loss_sum, targets, top1, top5 = by_position.sum(1).tolist()
    end_of_text_loss, windows, squared_loss, loss_by_targets, squared_targets = overall.tolist()
    if not targets:
        reason = "its mask excludes all tokens" if stream.has_mask else f"it has {stream.tokens} token"
        raise TrainingError(f"the split {stream.split!r} has no scored target: {reason}")
    loss = loss_sum / targets
    if not math.isfinite(loss):
        raise TrainingError(f"the loss on the split {stream.split!r} is {loss}; the checkpoint's weights are unusable")
    # The loss is a ratio of sums over windows, so compute the interval from the windows' deviations from this ratio.
    squared_deviations = max(squared_loss - 2 * loss * loss_by_targets + loss**2 * squared_targets, 0.0)
    half = Z_95 * math.sqrt(squared_deviations * windows / max(windows - 1, 1)) / targets
    bounds = [loss - half, loss + half] if windows >= FEWEST_VALUES else None
    # With another vocabulary than GPT-2's, the bytes of text are unknown (0). If a mask excludes tokens, the bytes of
    # the scored tokens are unknown.
    utf8_bytes = 0 if stream.has_mask else stream.utf8_bytes
    return {
        "protocol": PROTOCOL,
        "loss": loss,
        "perplexity": perplexity(loss),
        "loss_interval": bounds,
        "perplexity_interval": [perplexity(bound) for bound in bounds] if bounds else None,
        "interval": WINDOWS if bounds else TOO_FEW,
        "bits_per_byte": (loss_sum - end_of_text_loss) / math.log(2) / utf8_bytes if utf8_bytes else None,
        "top1_accuracy": top1 / targets,
        "top5_accuracy": top5 / targets,
        "target_tokens": int(targets),
        "utf8_bytes": stream.utf8_bytes or None,  # 0 in the manifest means unknown
        "documents": stream.documents or None,
        "loss_by_position": [None if math.isnan(mean) else mean for mean in (by_position[0] / by_position[1]).tolist()],
    }

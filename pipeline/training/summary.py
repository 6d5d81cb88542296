"""Log the settings of a run at its start, and its results at its end."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools.formatting import count_of, format_duration
from data_tools.shards.reader import TokenStream
from data_tools.shards.validation_split import describe_small_validation
from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.manifest import find_not_finite, read_manifest
from pipeline.checkpoint.state import backend_name
from pipeline.config.loading import dump_config
from pipeline.data.loader import scored_targets
from pipeline.errors import CheckpointError
from pipeline.hardware.device import describe_fp32_products
from pipeline.hardware.matmul_ceiling import describe_slow_precision
from pipeline.model.gpt2 import parameter_count
from pipeline.run_folder.layout import LOG_FILE
from pipeline.run_folder.metrics import MEAN_LOSS_KEY, describe_speed, read_metrics
from pipeline.training.resuming import (
    describe_raised_rate,
    describe_started_decay,
    windows_per_evaluation,
)
from pipeline.training.start import Start
from pipeline.training.trainer import Trainer

log = logging.getLogger(__name__)


def log_settings(trainer: Trainer, attention_kernel: str, start: Start | None) -> None:
    """Log what the run will do.

    Args:
        attention_kernel: torch's name for the kernel.
        start: the checkpoint from which the run continues, or None.
    """
    config, backend, device = trainer.config, trainer.backend, trainer.world.device
    dtypes = ", ".join(f"{what} {str(dtype).removeprefix('torch.')}" for what, dtype in backend.dtypes().items())
    log.info("run       %s -> %s", config.run.name, config.run.out_dir)
    log.info("model     %s, %s parameters", config.model, f"{parameter_count(config.model):,}")
    _log_data(trainer, start)
    if trainer.world.is_main:
        log_masks(trainer)
    log.info("batch     %s", trainer.plan)
    log.info("backend   %s on %s, world size %d", backend.describe(), device.type, trainer.world.size)
    remark = describe_fp32_products(config.run.precision, device)
    log.info("precision %s: %s%s", config.run.precision, dtypes, remark)
    if trainer.world.is_main and (warning := describe_slow_precision(config.run.precision, device)):
        log.warning(warning)
    log.info("attention %s", attention_kernel)
    log.info(
        "ceiling   %.3g FLOP/s, measured with matrix products; mfu is the share of it", trainer.throughput.ceiling_flops
    )
    log.info("start     %s", _describe_start(start, trainer.origin))
    for change in trainer.changes:
        log.info("changed   %s", change)
    for warning in (describe_started_decay(start, config), describe_raised_rate(start, config)) if start else ():
        if warning:
            log.warning(warning)


def _describe_start(start: Start | None, origin: dict[str, Any] | None) -> str:
    if start:
        saved_with = backend_name(start.state.config)
        return f"continues {start}, saved with {saved_with}, world size {start.state.world_size}"
    if origin is None:
        return "from scratch"
    step = "" if origin["step"] is None else f" (step {origin['step']} there)"
    return f"step 0 with the weights of {origin['path']}{step}; moments of zero"


def log_results(trainer: Trainer) -> None:
    """Log the results of a run that has ended."""
    state, results, folder = trainer.state, trainer.results, trainer.run_folder
    log.info(
        "done      %s, %s in %s",
        count_of(state.step, "step"),
        count_of(state.tokens, "token"),
        format_duration(trainer.record.elapsed_s()),
    )
    names = {MEAN_LOSS_KEY: "in the last training line", "validation_loss": "in the last validation"}
    if losses := [f"{results[key]:.4f} {name}" for key, name in names.items() if key in results]:
        log.info("loss      %s", ", ".join(losses))
    if trainer.world.is_main and (speed := describe_speed(read_metrics(folder))):
        log.info("speed     %s", speed)
    if skipped := state.step - state.updates:
        log.warning("skipped   %s, because the gradient norm was not finite", count_of(skipped, "step"))
    if failed := trainer.record.failed_saves:
        log.warning("failed    %s of a checkpoint", count_of(failed, "save"))
    if saved := _newest_finite_checkpoint(folder):
        log.info("saved     %s", saved)
    log.info("log       %s", folder / LOG_FILE)


def _newest_finite_checkpoint(run_folder: Path) -> Path | None:
    """Return the newest checkpoint whose manifest does not say that it contains NaN or infinite numbers, or None."""
    for folder in reversed(list_checkpoints(run_folder)):
        with suppress(CheckpointError):
            if find_not_finite(read_manifest(folder).files) is None:
                return folder
    return None


def log_masks(trainer: Trainer) -> None:
    """Log the percentage of scored targets for each split that has a loss mask.

    If a split contains samples without a scored target, log a warning.
    """
    seq_len = trainer.config.seq_len
    for dataset, order in zip(trainer.loader.datasets, trainer.loader.orders, strict=True):
        for stream, windows in ((dataset.train, order.n), (dataset.validation, None)):
            if stream is None or not stream.has_mask:
                continue
            counts = scored_targets(stream, seq_len)[:windows]
            split = f"{dataset.path}, {stream.split}"
            share = int(counts.sum()) / min(len(counts) * seq_len, stream.tokens - 1)
            log.info("mask      %s: %.2f%% of the targets are scored", split, 100 * share)
            if empty := int((counts == 0).sum()):
                log.warning(
                    "%s: %d of %d samples of %d tokens have no scored target, so nothing is learned or measured there; "
                    "if prompts are longer than data.seq_len, raise it or shorten them",
                    split,
                    empty,
                    len(counts),
                    seq_len,
                )


def _log_data(trainer: Trainer, start: Start | None) -> None:
    loader, max_steps = trainer.loader, trainer.config.schedule.max_steps
    counts = loader.mixture.counts(max_steps * trainer.plan.samples_per_step)
    for dataset, order, share, count in zip(loader.datasets, loader.orders, loader.mixture.shares, counts, strict=True):
        log.info(
            "data      %s: %s, %s%s, %.3g epochs in %s%s",
            dataset.path,
            count_of(dataset.train.tokens, "token"),
            count_of(order.n, "sample"),
            f", {float(share):.2%} of the mixture" if len(loader.datasets) > 1 else "",
            count / order.n,
            count_of(max_steps, "step"),
            ", with loss mask" if dataset.train.has_mask else "",
        )
        if dataset.validation:
            _log_validation(dataset.path, dataset.validation, trainer, start)


def _log_validation(path: str, validation: TokenStream, trainer: Trainer, start: Start | None) -> None:
    windows = -(-(validation.tokens - 1) // trainer.plan.seq_len)
    measured = min(windows, windows_per_evaluation(dump_config(trainer.config)) or windows)
    log.info(
        "          validation: %s, %s of %d, %s of them per evaluation",
        count_of(validation.tokens, "token"),
        count_of(windows, "window"),
        trainer.plan.seq_len,
        f"{measured:,}",
    )
    before = min(windows, windows_per_evaluation(start.state.config) or windows) if start else measured
    if before != measured:
        log.warning(
            "%s: an evaluation read %s validation windows before, so the validation losses before and after this start "
            "are of different texts; evaluation.max_batches counts batches of batch.micro_batch_size windows",
            path,
            f"{before:,}",
        )
    if warning := describe_small_validation(validation.manifest):
        log.warning("%s: %s", path, warning)

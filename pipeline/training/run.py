"""Run stage 2: build the world, batch plan, data, model, backend and trainer in this order, then train."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_tools.shards.reader import TokenStream
from data_tools.shards.validation_split import describe_small_validation
from data_tools.storage.new_folders import removed_if_unused
from data_tools.storage.sha256 import sha256_of_file
from pipeline.backends import create_backend
from pipeline.checkpoint.hashing import HashFile
from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.state import read_state
from pipeline.config.paths import with_working_dir
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.data.datasets import data_sha256, open_datasets, verify_datasets
from pipeline.data.loader import TrainLoader, scored_targets
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.device import describe_fp32_products, matmul_dtype
from pipeline.distributed.environment import launched_rank, set_mlflow_defaults
from pipeline.distributed.heartbeat import heartbeat
from pipeline.distributed.world import World, join_world
from pipeline.errors import ConfigError
from pipeline.evaluation.run import prepare_tasks
from pipeline.model.attention import fastest_kernel
from pipeline.model.gpt2 import allocate_model, flops_per_token, parameter_count
from pipeline.run_folder.heartbeat_file import HeartbeatFile
from pipeline.run_folder.layout import FLIGHT_RECORDER_FOLDER, LOG_FILE
from pipeline.run_folder.lock import lock_run_folder
from pipeline.run_folder.log_file import run_log
from pipeline.run_folder.metrics import describe_speed, format_duration, read_metrics
from pipeline.run_folder.sinks import check_sinks
from pipeline.training.compilation import choose_compilation
from pipeline.training.initial_weights import find_initial_weights, write_initial_weights
from pipeline.training.loss_in_blocks import choose_loss_in_blocks
from pipeline.training.remote_start import fetch_remote_start
from pipeline.training.resuming import (
    choose_start,
    describe_changes,
    describe_started_decay,
    load_start,
    make_run_folder,
    why_complete,
)
from pipeline.training.run_record import send_missing_rows
from pipeline.training.shared_folders import check_shared_folders
from pipeline.training.throughput import ThroughputMeter, measure_ceiling
from pipeline.training.trainer import Trainer

log = logging.getLogger(__name__)


def train(config: Config, hash_file: HashFile = sha256_of_file) -> Trainer | None:
    """Train to the last step of a run, from scratch or from a checkpoint.

    Returns the trainer, or None if the run is already complete. Keep a reference to the trainer until the process ends,
    because the process can hang when the trainer is freed.

    Args:
        hash_file: returns the SHA-256 of a file. It may have computed the hashes of the checkpoint before.

    Raises:
        UserError: the config, a dataset or a checkpoint cannot be used, or training cannot continue.
        Interrupted: a signal asked the run to stop. A checkpoint was saved.
        LostRankError: another rank died or hangs.
    """
    config = with_working_dir(config)
    records = Path(config.run.out_dir) / FLIGHT_RECORDER_FOLDER
    with run_log(launched_rank()) as log_file, join_world(config.run) as world, ExitStack() as resources:
        with heartbeat(world, config.run.rank_timeout_s, records):
            if world.device.type != "mps":
                log.info("threads   %s", configure_cpu(world))
            trainer = _build_trainer(config, world, resources, hash_file)
            if trainer is None:
                return None
            log_file.open(trainer.run_folder)
            trainer.fit()
        trainer.backend.close()
        _log_end(trainer)
    return trainer


def _build_trainer(config: Config, world: World, resources: ExitStack, hash_file: HashFile) -> Trainer | None:
    """Build the trainer and everything that it needs, or return None if the run is already complete.

    Args:
        resources: the stack that holds the lock of the run folder and the choice of the attention kernel.
    """
    if world.device.type == "mps" and config.backend.name != "ddp":
        raise ConfigError(f"backend.name: {config.backend.name} does not run on mps; use ddp, or run.device cpu")
    if world.device.type == "mps" and config.model.dropout and config.model.activation_checkpointing:
        raise ConfigError(
            "model.activation_checkpointing: on mps, torch would draw other dropout masks when it recomputes a block; "
            "set it to false, or model.dropout to 0"
        )
    if "mlflow" in config.logging.sinks:
        set_mlflow_defaults()
    world.call_on_main(lambda: check_sinks(config.logging.sinks, config.logging.project))
    plan = world.call_on_main(lambda: plan_batch(config, world.size))
    datasets = open_datasets(config)
    loader = TrainLoader(datasets, plan, config.run.seed, world.rank)

    sha256 = data_sha256(datasets)
    world.call_on_main(lambda: open_run_folder(config, resources))
    check_shared_folders(Path(config.run.out_dir), sha256, world)
    fetch_remote_start(config, world)
    start = world.call_on_main(lambda: choose_start(config, sha256, hash_file))
    if start and (reason := world.call_on_main(lambda: why_complete(start, config))):
        log.info("%s: %s", start, reason)
        world.call_on_main(lambda: send_missing_rows(config))
        return None
    heartbeat_file = HeartbeatFile(Path(config.run.out_dir) if world.is_main else None)
    resources.enter_context(heartbeat_file.starting(read_state(start)[0].step if start else 0))
    world.progress.listener = heartbeat_file.beat
    weights = None if start else world.call_on_main(lambda: find_initial_weights(config))
    if config.data.verify:
        verify_datasets(datasets, world)
    tasks = prepare_tasks(config, world)

    dtype = matmul_dtype(config.run.precision)
    ceiling_flops = measure_ceiling(world, config)
    throughput = ThroughputMeter(plan.tokens_per_step, flops_per_token(config.model, config.seq_len), ceiling_flops)
    queries = (plan.micro_batch_size, config.model.n_head, config.seq_len, config.model.n_embd // config.model.n_head)
    kernel = resources.enter_context(fastest_kernel(world.device, dtype, queries, config.model.dropout))
    config = choose_compilation(config, world, plan, start)
    config = choose_loss_in_blocks(config, world, plan, start)
    backend = create_backend(allocate_model(config.model, "meta"), config, world, plan)
    backend.model.assert_tied()
    origin = None if start else write_initial_weights(weights, backend, config.run.seed)
    state = load_start(start, config, sha256, backend, world)
    trainer = Trainer(config, world, backend, loader, throughput, state, tasks, origin, heartbeat_file)
    _log_settings(trainer, kernel, start)
    return trainer


def open_run_folder(config: Config, resources: ExitStack) -> None:
    """Create and lock the run folder.

    Args:
        resources: the stack that releases the lock when it closes. If the run could not start, the stack also removes
            the folders that this call created.
    """
    folder = Path(config.run.out_dir)
    resources.enter_context(removed_if_unused(make_run_folder(folder)))
    resources.enter_context(lock_run_folder(folder))


def _log_settings(trainer: Trainer, attention_kernel: str, start: Path | None) -> None:
    config, backend, device = trainer.config, trainer.backend, trainer.world.device
    dtypes = ", ".join(f"{what} {str(dtype).removeprefix('torch.')}" for what, dtype in backend.dtypes().items())
    log.info("run       %s -> %s", config.run.name, config.run.out_dir)
    log.info("model     %s, %s parameters", config.model, f"{parameter_count(config.model):,}")
    _log_data(trainer)
    if trainer.world.is_main:
        log_masks(trainer)
    log.info("batch     %s", trainer.plan)
    log.info("backend   %s on %s, world size %d", backend.describe(), device.type, trainer.world.size)
    remark = describe_fp32_products(config.run.precision, device)
    log.info("precision %s: %s%s", config.run.precision, dtypes, remark)
    log.info("attention %s", attention_kernel)
    log.info("ceiling   %.3g FLOP/s in matrix products, measured (MFU 100%%)", trainer.throughput.ceiling_flops)
    log.info("start     %s", _describe_start(start, trainer.origin))
    for change in describe_changes(start, config) if start else ():
        log.info("changed   %s", change)
    if start and (warning := describe_started_decay(start, config)):
        log.warning(warning)


def _describe_start(start: Path | None, origin: dict[str, Any] | None) -> str:
    if start:
        return f"continues {start}"
    if origin is None:
        return "from scratch"
    step = "" if origin["step"] is None else f" (step {origin['step']} there)"
    return f"step 0 with the weights of {origin['path']}{step}; moments of zero"


def _log_end(trainer: Trainer) -> None:
    state, results, folder = trainer.state, trainer.results, trainer.run_folder
    log.info(
        "done      %s steps, %s tokens in %s",
        f"{state.step:,}",
        f"{state.tokens:,}",
        format_duration(trainer.record.elapsed_s()),
    )
    names = {"loss": "in training", "validation_loss": "in validation"}
    if losses := [f"{results[key]:.4f} {name}" for key, name in names.items() if key in results]:
        log.info("loss      %s", ", ".join(losses))
    if trainer.world.is_main and (speed := describe_speed(read_metrics(folder))):
        log.info("speed     %s", speed)
    if skipped := state.step - state.updates:
        log.warning("skipped   %d steps, because their gradient norm was not finite", skipped)
    if failed := trainer.record.failed_saves:
        log.warning("failed    %d saves of a checkpoint", failed)
    if checkpoints := list_checkpoints(folder):
        log.info("saved     %s", checkpoints[-1])
    log.info("log       %s", folder / LOG_FILE)


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


def _log_data(trainer: Trainer) -> None:
    loader, max_steps = trainer.loader, trainer.config.schedule.max_steps
    counts = loader.mixture.counts(max_steps * trainer.plan.samples_per_step)
    for dataset, order, share, count in zip(loader.datasets, loader.orders, loader.mixture.shares, counts, strict=True):
        log.info(
            "data      %s: %s tokens, %s samples%s, %.3g epochs in %d steps%s",
            dataset.path,
            f"{dataset.train.tokens:,}",
            f"{order.n:,}",
            f", {float(share):.2%} of the mixture" if len(loader.datasets) > 1 else "",
            count / order.n,
            max_steps,
            ", with loss mask" if dataset.train.has_mask else "",
        )
        if dataset.validation:
            _log_validation(dataset.path, dataset.validation, trainer)


def _log_validation(path: str, validation: TokenStream, trainer: Trainer) -> None:
    windows = -(-(validation.tokens - 1) // trainer.plan.seq_len)
    measured = (trainer.config.evaluation.max_batches or windows) * trainer.plan.micro_batch_size
    log.info(
        "          validation: %s tokens, %s windows of %d, %s of them per evaluation",
        f"{validation.tokens:,}",
        f"{windows:,}",
        trainer.plan.seq_len,
        f"{min(windows, measured):,}",
    )
    if warning := describe_small_validation(validation.manifest):
        log.warning("%s: %s", path, warning)

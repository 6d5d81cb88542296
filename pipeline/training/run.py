"""Run stage 2: build the world, batch plan, data, model, backend and trainer in this order, then train."""

import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from data_tools.storage.remote import require_writable_url
from data_tools.storage.sha256 import sha256_of_file
from pipeline.backends import create_backend
from pipeline.checkpoint.hashing import HashFile
from pipeline.config.paths import with_working_dir
from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan, plan_batch
from pipeline.data.datasets import data_sha256, open_datasets, tokenizer_of, verify_datasets
from pipeline.data.loader import TrainLoader
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.environment import launched_rank, set_mlflow_defaults
from pipeline.distributed.heartbeat import heartbeat
from pipeline.distributed.world import World, join_world
from pipeline.errors import ConfigError
from pipeline.hardware.device import matmul_dtype
from pipeline.model.attention import fastest_kernel
from pipeline.model.gpt2 import allocate_model, flops_per_token
from pipeline.run_folder.heartbeat_file import HeartbeatFile
from pipeline.run_folder.layout import FLIGHT_RECORDER_FOLDER
from pipeline.run_folder.lock import open_run_folder
from pipeline.run_folder.log_file import run_log
from pipeline.run_folder.sinks import check_sinks
from pipeline.training.compilation import choose_compilation
from pipeline.training.evaluation import prepare_tasks
from pipeline.training.initial_weights import find_initial_weights, write_initial_weights
from pipeline.training.loss_in_blocks import choose_loss_in_blocks
from pipeline.training.rank_agreement import check_agreement
from pipeline.training.remote_start import fetch_remote_start
from pipeline.training.resuming import (
    describe_changes,
    find_start,
    load_start,
    prepare_run_folder,
    tidy_run_folder,
    why_complete,
)
from pipeline.training.run_record import send_missing_rows
from pipeline.training.start import Start
from pipeline.training.summary import log_results, log_settings
from pipeline.training.throughput import ThroughputMeter, measure_ceiling
from pipeline.training.trainer import Trainer
from pipeline.training.uploads import require_uploaded, upload_missing

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
            log_results(trainer)
            require_uploaded(trainer.mirror, world)
        trainer.backend.close()
    return trainer


def _build_trainer(config: Config, world: World, resources: ExitStack, hash_file: HashFile) -> Trainer | None:
    """Build the trainer and everything that it needs, or return None if the run is already complete.

    Everything that can fail before the first step comes before ``prepare_run_folder``. A failed start therefore leaves
    the checkpoints as they are.

    Args:
        resources: the stack that holds the lock of the run folder and the choice of the attention kernel.
    """
    _check_support(config, world)
    plan = world.call_on_main(lambda: plan_batch(config, world.size))
    datasets = world.call_on_each(lambda: open_datasets(config))  # each host can have its own copy
    loader = TrainLoader(datasets, plan, config.run.seed, world.rank)
    sha256 = data_sha256(datasets)

    start = _lock_and_find_start(config, sha256, world, resources, hash_file)
    if start and (reason := world.call_on_main(lambda: why_complete(start, config))):
        log.info("%s: %s", start, reason)
        world.call_on_main(lambda: tidy_run_folder(config))
        world.call_on_main(lambda: send_missing_rows(config))
        upload_missing(config, world)
        return None
    heartbeat_file = _start_heartbeat_file(config, start, world, resources)
    # Before the data is read: a mistake in ``checkpoint.init_from`` must be reported at once.
    weights = None if start else world.call_on_main(lambda: find_initial_weights(config))
    if config.data.verify:
        verify_datasets(datasets, world)
    tasks = prepare_tasks(config, world, tokenizer_of(datasets))

    flops = flops_per_token(config.model, config.seq_len)
    throughput = ThroughputMeter(plan.tokens_per_step, flops, measure_ceiling(world, config), world.device)
    config, kernel = _tune(config, plan, start, world, resources)
    backend = create_backend(allocate_model(config.model, "meta"), config, world, plan)
    backend.model.assert_tied()
    origin = None if start else write_initial_weights(weights, config, backend, tokenizer_of(datasets), world)
    state = load_start(start, config, sha256, tokenizer_of(datasets), backend, world)
    changes = describe_changes(start, config) if start else ()
    trainer = Trainer(config, world, backend, loader, throughput, state, tasks, origin, heartbeat_file, changes)
    log_settings(trainer, kernel, start)
    world.call_on_main(lambda: prepare_run_folder(start, config))
    return trainer


def _check_support(config: Config, world: World) -> None:
    """Raise UserError if the device, or the packages on the host of this rank, do not support the config."""
    world.call_on_each(lambda: _check_host(config, world.device))
    if "mlflow" in config.logging.sinks:
        set_mlflow_defaults()
    world.call_on_main(lambda: check_sinks(config.logging.sinks, config.logging.project))


def _check_host(config: Config, device: torch.device) -> None:
    _check_device(config, device)
    if config.checkpoint.remote is not None:
        require_writable_url(config.checkpoint.remote, "checkpoint.remote")


def _lock_and_find_start(
    config: Config, data_sha256: str, world: World, resources: ExitStack, hash_file: HashFile
) -> Start | None:
    """Lock the run folder, and return the checkpoint from which the run continues, or None for a new run."""
    run_folder = Path(config.run.out_dir)
    world.call_on_main(lambda: resources.enter_context(open_run_folder(run_folder)))  # before all writes into it
    check_agreement(config, data_sha256, world)  # before the ranks download into the folder that they must share
    fetch_remote_start(config, world)
    return world.call_on_main(lambda: find_start(config, data_sha256, hash_file))


def _start_heartbeat_file(config: Config, start: Start | None, world: World, resources: ExitStack) -> HeartbeatFile:
    heartbeat_file = HeartbeatFile(Path(config.run.out_dir) if world.is_main else None)
    resources.enter_context(heartbeat_file.starting(start.state.step if start else 0))
    world.progress.listener = heartbeat_file.beat
    return heartbeat_file


def _tune(
    config: Config, plan: BatchPlan, start: Start | None, world: World, resources: ExitStack
) -> tuple[Config, str]:
    """Choose what makes a step fast. Returns the config with these choices, and the name of the attention kernel.

    ``choose_compilation`` and ``choose_loss_in_blocks`` measure with the chosen kernel. The kernel stays selected until
    ``resources`` is closed, because each forward pass uses the selected kernel.
    """
    model, dtype = config.model, matmul_dtype(config.run.precision)
    queries = (plan.micro_batch_size, model.n_head, config.seq_len, model.n_embd // model.n_head)
    kernel = resources.enter_context(fastest_kernel(world.device, dtype, queries, model.dropout))
    config = choose_compilation(config, world, plan, start)
    return choose_loss_in_blocks(config, world, plan, start), kernel


def _check_device(config: Config, device: torch.device) -> None:
    """Raise ConfigError if the run cannot train on the device."""
    if device.type == "mps" and config.backend.name != "ddp":
        raise ConfigError(f"backend.name: {config.backend.name} does not run on mps; use ddp, or run.device cpu")
    if device.type == "mps" and config.model.dropout and config.model.activation_checkpointing:
        raise ConfigError(
            "model.activation_checkpointing: on mps, torch would draw other dropout masks when it recomputes a block; "
            "set it to false, or model.dropout to 0"
        )

"""Builds what a run needs, in order: world, plan, data, model, backend; then hands over to the trainer."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from pipeline.backends import create_backend
from pipeline.checkpoint import read_state
from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan, plan_batch
from pipeline.data.datasets import data_sha256, open_parts, verify_parts
from pipeline.data.loader import TrainLoader
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.device import matmul_dtype, measure_matmul_ceiling
from pipeline.distributed.heartbeat import heartbeat
from pipeline.distributed.world import World, join_world
from pipeline.errors import ConfigError
from pipeline.evaluation.while_training import prepare_tasks
from pipeline.model.attention import fastest_kernel
from pipeline.model.gpt2 import build_model, flops_per_token, parameter_count
from pipeline.run_folder.lock import lock_run_folder
from pipeline.training.compilation import choose_compilation
from pipeline.training.resuming import choose_start, make_run_folder
from pipeline.training.throughput import ThroughputMeter
from pipeline.training.trainer import Trainer

log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Train a run to its end, or continue it.

    Raises:
        UserError: a config, data set or checkpoint that cannot be used; nothing has started then.
        Interrupted: a signal asked to stop; the state is saved.
        LostRankError: another rank is gone.
    """
    with join_world(config.run) as world, ExitStack() as held:
        with heartbeat(world, config.run.rank_timeout_s):
            if world.device.type == "cpu":
                log.info("threads   %s", configure_cpu(world))
            trainer = _build_trainer(config, world, held)
            if trainer is None:
                return
            trainer.fit()
        trainer.backend.close()
        log.info("done: %d steps, %s", trainer.state.step, config.run.out_dir)


def _build_trainer(config: Config, world: World, held: ExitStack) -> Trainer | None:
    """Everything that a trainer needs, in order; None: the run has come to its end before.

    Args:
        held: holds the run folder's lock and the choice of the attention kernel afterwards.
    """
    if world.device.type == "mps" and config.backend.name != "ddp":
        raise ConfigError(f"backend.name: {config.backend.name} does not run on mps; use ddp, or run.device cpu")
    plan = plan_batch(config, world.size)
    parts = open_parts(config.data, config.model)
    loader = TrainLoader(parts, plan, config.run.seed, world.rank)
    sha256 = data_sha256(parts)
    world.call_on_main(lambda: _occupy_run_folder(config, held))
    resume_from = world.call_on_main(lambda: choose_start(config, sha256))
    if resume_from and read_state(resume_from)[0].step >= config.schedule.max_steps:
        log.info("%s: already at step %d, nothing to train", resume_from, config.schedule.max_steps)
        return None
    if config.data.verify:
        verify_parts(parts, world)
    tasks = prepare_tasks(config, world)
    throughput = _throughput_meter(config, world, plan)
    config = choose_compilation(config, world, throughput.ideal_step_s * config.schedule.max_steps)
    head_dim = config.model.n_embd // config.model.n_head
    kernel = held.enter_context(fastest_kernel(world.device, matmul_dtype(config.run.precision), head_dim))
    backend = create_backend(build_model(config.model, config.run.seed), config, world, plan)
    backend.model.assert_tied()
    trainer = Trainer(config, world, plan, backend, loader, throughput, sha256, resume_from, tasks)
    _announce(trainer, kernel, resume_from)
    return trainer


def _occupy_run_folder(config: Config, held: ExitStack) -> None:
    """Make the folder and hold it until ``held`` is left."""
    folder = Path(config.run.out_dir)
    make_run_folder(folder)
    held.enter_context(lock_run_folder(folder))


def _throughput_meter(config: Config, world: World, plan: BatchPlan) -> ThroughputMeter:
    """Every rank measures at the same time: on a CPU the ranks share the cores."""
    ceiling = measure_matmul_ceiling(world.device, matmul_dtype(config.run.precision))
    return ThroughputMeter(
        plan.tokens_per_step, flops_per_token(config.model, config.seq_len), sum(world.gather(ceiling))
    )


def _announce(trainer: Trainer, attention_kernel: str, resume_from: Path | None) -> None:
    """What is really in use, before the first step."""
    config, backend, device = trainer.config, trainer.backend, trainer.world.device
    dtypes = ", ".join(f"{what} {str(dtype).removeprefix('torch.')}" for what, dtype in backend.dtypes().items())
    ceiling = trainer.throughput.ceiling_flops
    log.info("run       %s -> %s", config.run.name, config.run.out_dir)
    log.info("model     %s, %s parameters", config.model.preset, f"{parameter_count(config.model):,}")
    _announce_data(trainer)
    log.info("batch     %s", trainer.plan)
    log.info("backend   %s on %s, world size %d", backend.describe(), device.type, trainer.world.size)
    log.info("precision %s: %s", config.run.precision, dtypes)
    log.info("compile   %s", "on" if config.run.compile else "off")
    log.info("attention %s", attention_kernel)
    log.info("ceiling   %.3g FLOP/s in matrix products, measured: what MFU is a share of", ceiling)
    log.info("start     %s", f"continues {resume_from}" if resume_from else "from scratch")


def _announce_data(trainer: Trainer) -> None:
    """What there is, and how often the run goes through it."""
    loader = trainer.loader
    counts = loader.mixture.counts(trainer.config.schedule.max_steps * trainer.plan.samples_per_step)
    for part, order, share, drawn in zip(loader.parts, loader.orders, loader.mixture.shares, counts, strict=True):
        weight = f", {float(share):.2%} of the samples" if len(loader.parts) > 1 else ""
        log.info(
            "data      %s: %s tokens, %s samples%s, %.3g epochs in %d steps%s",
            part.path,
            f"{part.train.tokens:,}",
            f"{order.n:,}",
            weight,
            drawn / order.n,
            trainer.config.schedule.max_steps,
            ", masked" if part.train.has_mask else "",
        )

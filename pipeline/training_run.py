"""Builds what a run needs, in order: world, plan, data, model, backend; then hands over to the trainer."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from data_tools.errors import UserError
from data_tools.shards import TRAIN_SPLIT, VAL_SPLIT, TokenStream, open_split
from pipeline.backends import create_backend
from pipeline.batch_plan import BatchPlan, plan_batch
from pipeline.checkpoint import list_checkpoints, locate_checkpoint, newest_good_checkpoint, read_state
from pipeline.config import Config
from pipeline.distributed import World, join_world
from pipeline.errors import CheckpointError, ConfigError
from pipeline.hardware import compiler_works, flash_attention_runs, matmul_dtype, measure_matmul_ceiling
from pipeline.loader import TargetMask, TrainLoader, expect_same_vocabulary
from pipeline.model import build_model, flops_per_token, parameter_count
from pipeline.throughput import ThroughputMeter
from pipeline.trainer import Trainer

log = logging.getLogger(__name__)


def train(config: Config, target_mask: TargetMask | None = None) -> None:
    """Train a run to its end, or continue it.

    Args:
        target_mask: which targets are scored; None: all.

    Raises:
        UserError: a config, data set or checkpoint that cannot be used; nothing has started then.
    """
    with join_world(config.run) as world:
        if world.device.type == "mps" and config.backend.name != "ddp":
            raise ConfigError(f"backend.name: {config.backend.name} does not run on mps; use ddp, or run.device cpu")
        plan = plan_batch(config, world.size)
        stream, validation = _open_data(config)
        loader = TrainLoader(stream, plan, config.run.seed, world.rank, target_mask)
        resume_from = world.broadcast(_prepare_start(config) if world.is_main else None)
        if isinstance(resume_from, UserError):
            raise resume_from
        if resume_from and read_state(resume_from)[0].step >= config.schedule.max_steps:
            log.info("%s: already at step %d, nothing to train", resume_from, config.schedule.max_steps)
            return
        config = _with_working_compiler(config, world)
        backend = create_backend(build_model(config.model, config.run.seed), config, world, plan)
        backend.model.assert_tied()
        throughput = _throughput_meter(config, world, plan)
        trainer = Trainer(config, world, plan, backend, loader, validation, throughput, resume_from)
        _announce(trainer, resume_from)
        trainer.fit()
        world.barrier()
        backend.close()
        log.info("done: %d steps, %s", trainer.state.step, config.run.out_dir)


def _open_data(config: Config) -> tuple[TokenStream, TokenStream | None]:
    stream = open_split(config.data.path, TRAIN_SPLIT)
    expect_same_vocabulary(stream, config.model, config.data.path)
    if stream.manifest.tokens_of(VAL_SPLIT):
        return stream, open_split(config.data.path, VAL_SPLIT)
    log.warning("%s has no validation split: no validation loss in this run", config.data.path)
    return stream, None


def _prepare_start(config: Config) -> Path | None | UserError:
    """What to continue from, with the run folder made, on the main rank. An error is returned: every rank raises it."""
    try:
        resume_from = _find_resume(Path(config.run.out_dir), config.checkpoint.resume)
        if resume_from:
            _expect_same_order(config, resume_from)
        _make_run_folder(Path(config.run.out_dir))
        return resume_from
    except UserError as error:
        return error


def _find_resume(run_folder: Path, resume: str) -> Path | None:
    if resume == "auto":
        return newest_good_checkpoint(run_folder)
    if resume != "none":
        return locate_checkpoint(Path(resume))
    if list_checkpoints(run_folder):
        raise CheckpointError(
            f"{run_folder} already holds checkpoints of a run; give another run.out_dir, "
            "or continue it with --resume auto"
        )
    return None


def _make_run_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.out_dir: cannot make {folder} ({error.strerror}); name a folder to write into"
        ) from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"run.out_dir: {folder} cannot be written; name a folder to write into")


def _expect_same_order(config: Config, folder: Path) -> None:
    """The samples consumed so far mean the same only under the same seed and sample length."""
    state, stored = read_state(folder)
    stored_length = stored.get("data", {}).get("seq_len") or stored.get("model", {}).get("context_length")
    for key, before, now in (
        ("run.seed", state.seed, config.run.seed),
        ("data.seq_len", stored_length, config.seq_len),
    ):
        if before != now:
            raise CheckpointError(
                f"{folder}: was trained with {key} {before}, now it is {now}: the order of the data would change; "
                f"set {key} to {before}, or another run.out_dir"
            )


def _with_working_compiler(config: Config, world: World) -> Config:
    if not config.run.compile or all(world.gather(compiler_works(world.device))):
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"compile": False})})


def _throughput_meter(config: Config, world: World, plan: BatchPlan) -> ThroughputMeter:
    """Every rank measures at the same time: on a CPU the ranks share the cores."""
    ceiling = measure_matmul_ceiling(world.device, matmul_dtype(config.run.precision))
    return ThroughputMeter(
        plan.tokens_per_step, flops_per_token(config.model, config.seq_len), sum(world.gather(ceiling))
    )


def _announce(trainer: Trainer, resume_from: Path | None) -> None:
    """What is really in use, before the first step."""
    config, loader, backend, device = trainer.config, trainer.loader, trainer.backend, trainer.world.device
    dtypes = ", ".join(f"{what} {str(dtype).removeprefix('torch.')}" for what, dtype in backend.dtypes().items())
    head_dim = config.model.n_embd // config.model.n_head
    fused_attention = flash_attention_runs(device, matmul_dtype(config.run.precision), head_dim)
    ceiling = trainer.throughput.ceiling_flops
    log.info("run       %s -> %s", config.run.name, config.run.out_dir)
    log.info("model     %s, %s parameters", config.model.preset, f"{parameter_count(config.model):,}")
    log.info(
        "data      %s: %s tokens, %s samples", config.data.path, f"{loader.stream.tokens:,}", f"{loader.order.n:,}"
    )
    log.info("batch     %s", trainer.plan)
    log.info("backend   %s on %s, world size %d", backend.describe(), device.type, trainer.world.size)
    log.info("precision %s: %s", config.run.precision, dtypes)
    log.info("compile   %s", "on" if config.run.compile else "off")
    if fused_attention:
        log.info("attention fused kernel")
    else:
        log.warning("attention has no fused kernel for this device and dtype: plain matrix products")
    log.info("ceiling   %.3g FLOP/s in matrix products, measured: what MFU is a share of", ceiling)
    log.info("start     %s", f"continues {resume_from}" if resume_from else "from scratch")

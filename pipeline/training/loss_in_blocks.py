"""Decide whether a run computes the loss in blocks of the vocabulary (``run.loss_in_blocks``)."""

import logging
from typing import Literal

from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan
from pipeline.distributed.world import World
from pipeline.hardware.device import matmul_dtype
from pipeline.model.blocked_loss import measure_kept_blocks
from pipeline.model.output_layer import padded_vocab_size
from pipeline.training.start import Start

log = logging.getLogger(__name__)

LEAST_GAIN = 0.15  # the least share of the measured time that kept blocks must save
LEAST_LOGITS = 1 << 25  # with fewer logits in a micro-batch, the output layer is fast anyway


def choose_loss_in_blocks(config: Config, world: World, plan: BatchPlan, start: Start | None) -> Config:
    """Return the config with the choice for ``auto`` in ``run.loss_in_blocks``. The value is the same on every rank.

    The choice is ``kept`` for a compiled run on a CPU, if this saves time in a short measurement. Otherwise, it is
    false. On a CPU, a resumed run keeps its earlier choice, because blocks change rounding. Every rank must call this.

    Args:
        start: the checkpoint from which the run resumes, or None.
    """
    if config.run.loss_in_blocks != "auto":
        return config
    return config.with_run(loss_in_blocks=_choose(config, world, plan, start))


def _choose(config: Config, world: World, plan: BatchPlan, start: Start | None) -> Literal["kept", False]:
    if world.device.type != "cpu":
        return False
    before = start.setting("run", "loss_in_blocks") if start else None
    if before in ("kept", False):
        return before
    rows, width = plan.micro_batch_size * plan.seq_len, config.model.n_embd
    padded = padded_vocab_size(config.model.vocab_size)
    if not config.run.compiles or rows * padded < LEAST_LOGITS:
        return False
    measured = world.gather(measure_kept_blocks(rows, width, padded, matmul_dtype(config.run.precision)))
    whole_s, blocks_s = (sum(times) for times in zip(*measured, strict=True))
    log.info("logits    measured: in blocks, the products take %.0f%% of the usual time", 100 * blocks_s / whole_s)
    return "kept" if blocks_s <= (1 - LEAST_GAIN) * whole_s else False

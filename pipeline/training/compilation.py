"""Decide whether a run compiles the model with torch.compile (``run.compile``)."""

import logging
import signal
import time

import torch

from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan
from pipeline.distributed.world import World
from pipeline.hardware.device import compiler_works
from pipeline.model.gpt2 import GPT2, allocate_model
from pipeline.model.initialisation import INIT_STD
from pipeline.model.precision import replicated_compute
from pipeline.training.interruption import STOP_SIGNALS
from pipeline.training.start import Start

log = logging.getLogger(__name__)

#: On a CPU, Inductor takes one to three minutes to compile training and validation, and saves a third of each step.
SHORTEST_COMPILED_CPU_RUN_S = 600.0

_TIMED_TOKENS = 2048  # enough that the time grows with the tokens, few enough to need little memory
_TIMED_PASSES = 4  # the first one warms up


def choose_compilation(config: Config, world: World, plan: BatchPlan, start: Start | None) -> Config:
    """Return the config with ``run.compile`` set to true or false. The value is the same on every rank.

    Every rank must call this. If a rank has no working compiler, the value is false. Otherwise, ``auto`` means:

    - On CUDA, the value is true.
    - On MPS, the value is false.
    - On a CPU, the value is true if the steps that are left take more than ``SHORTEST_COMPILED_CPU_RUN_S``. A resumed
      run keeps the value with which its checkpoint was trained, because compilation changes rounding.

    Args:
        start: the checkpoint from which the run resumes, or None.
    """
    wanted, reason = config.run.compile, ""
    if wanted == "auto":
        wanted, reason = _decide(config, world, plan, start)
    if wanted and not all(world.gather(_probe_compiler(world.device))):
        wanted, reason = False, "no compiler on every rank"
    log.info("compile   %s%s", "on" if wanted else "off", f" ({reason})" if reason else "")
    return config.with_run(compile=wanted)


def _probe_compiler(device: torch.device) -> bool:
    """Return whether ``torch.compile`` works.

    The probe starts Inductor's threads. They inherit the signal mask, and so do the compilers that they start later:
    a Ctrl-C must not end these compilers. See ``StopRequest.listening``.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return compiler_works(device)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _decide(config: Config, world: World, plan: BatchPlan, start: Start | None) -> tuple[bool, str]:
    if world.device.type != "cpu":
        return world.device.type == "cuda", f"auto: always so on {world.device.type}"
    before = start.setting("run", "compile") if start else None
    if isinstance(before, bool):
        return before, f"auto: as before {start}"
    step = start.state.step if start else 0
    micro_steps = plan.accumulation * (config.schedule.max_steps - step)
    for tokens, passes in ((plan.seq_len, 1), (_TIMED_TOKENS, _TIMED_PASSES)):
        run_s = micro_steps * max(world.gather(measure_micro_step(config, plan, tokens, passes)))
        if run_s <= SHORTEST_COMPILED_CPU_RUN_S:  # the single pass is too long, never too short
            break
    pays_off = run_s > SHORTEST_COMPILED_CPU_RUN_S
    what, bound = "the rest of the run" if step else "the run", "" if pays_off else "at most "
    return pays_off, f"auto: {what} takes {bound}{run_s:,.0f} s uncompiled"


def measure_micro_step(config: Config, plan: BatchPlan, tokens: int, passes: int) -> float:
    """Return the seconds of the forward and backward pass of one micro-batch on a CPU without compilation.

    The time of a few sequences is measured, and scaled to the micro-batch. The global random generator does not change.

    Args:
        tokens: about how many tokens the measured sequences contain.
        passes: how often to measure. The shortest time counts, because the first pass is slower.
    """
    sequences = min(plan.micro_batch_size, max(1, tokens // plan.seq_len))
    compute = replicated_compute(_timed_model(config), config.run.precision, torch.device("cpu"))
    samples = torch.zeros(sequences, plan.seq_len, dtype=torch.int64)
    shortest = float("inf")
    with torch.random.fork_rng(devices=[]):
        for _ in range(passes):
            started = time.perf_counter()
            compute(samples, samples, method="loss").backward()  # type: ignore[no-untyped-call]
            shortest = min(shortest, time.perf_counter() - started)
            compute.zero_grad(set_to_none=True)
    return shortest * plan.micro_batch_size / sequences


def _timed_model(config: Config) -> GPT2:
    """Return a model of the same depth as the run's model, in which all blocks share the weights of the first block.

    All weights have the same value, because the values do not affect the time, and random ones take time to draw.

    It does the same amount of computation, and fits into the memory of a rank that holds only a shard of the real
    model.
    """
    model = allocate_model(config.model.model_copy(update={"n_layer": 1}), "cpu")
    for weight in model.parameters():
        weight.detach().fill_(INIT_STD)
    (first,) = model.h
    model.h.extend(allocate_model(config.model, "meta").h[1:])
    for block in model.h[1:]:
        for module, twin in zip(block.modules(), first.modules(), strict=True):
            for name, weight in twin.named_parameters(recurse=False):
                setattr(module, name, weight)
    return model

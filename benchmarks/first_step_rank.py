"""Train the first steps of a compiled backend, and write their times, for ``first_step``.

python benchmarks/first_step_rank.py SETTING_JSON BACKEND blocks|whole OUT.json        # under torchrun, or alone
"""

from __future__ import annotations

import importlib
import json
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from launch.cli import run_command
from benchmarks.train_setting import Setting
from pipeline.backends import Backend, create_backend
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.world import World, join_world
from pipeline.model.gpt2 import GPT2, allocate_model
from tests.support.runs import CONFIGS, overrides

BLOCKS, WHOLE = "blocks", "whole"


@dataclass(frozen=True)
class Measured:
    """The steps of one run. CPU times are sums over all ranks and their compilers."""

    first_s: float  # of the slowest rank
    first_cpu_s: float
    later_cpu_s: float  # median of the steps after the warm-up
    graphs: int  # of one rank
    breaks: int


def main() -> Backend:
    """Return the backend, which ``run_command`` keeps in memory."""
    setting, backend_name, unit, out = Setting.from_json(sys.argv[1]), *sys.argv[2:4], Path(sys.argv[4])
    config = load_config([CONFIGS / f"{backend_name}.json"], overrides(setting.sections()))
    with join_world(config.run) as world:
        if world.device.type == "cpu":
            configure_cpu(world)
        choose_unit(unit, config)
        backend, times = train(config, world, setting.steps)
        first, *later = zip(*world.gather(times), strict=True)  # per step: (seconds, CPU seconds) of each rank
        cpu_s = [sum(cpu for _, cpu in ranks) for ranks in (first, *later)]
        measured = Measured(
            first_s=max(seconds for seconds, _ in first),
            first_cpu_s=cpu_s[0],
            later_cpu_s=statistics.median(cpu_s[setting.warmup_steps :]),
            graphs=counters["aot_autograd"]["total"],
            breaks=sum(counters["graph_break"].values()),
        )
        if world.is_main:
            out.write_text(json.dumps(asdict(measured)))
        backend.close()
    return backend


def choose_unit(unit: str, config: Config) -> None:
    """Let the backends of this process compile single blocks or the whole model."""
    name = "deepspeed_zero" if config.backend.name == "deepspeed" else config.backend.name
    module = importlib.import_module(f"pipeline.backends.{name}")  # DeepSpeed takes seconds to import
    vars(module)["compiles_blocks"] = lambda world: unit == BLOCKS
    if unit == WHOLE:  # for the backends that would always compile blocks
        vars(module)["compile_blocks"] = compile_whole


def compile_whole(model: GPT2) -> None:
    """Compile the model as one module. Hooks inside the model break the graph."""
    model.compile(dynamic=False)


def train(config: Config, world: World, steps: int) -> tuple[Backend, list[tuple[float, float]]]:
    """Build the backend as a run does. Returns the seconds and CPU seconds of each step with one micro-batch."""
    plan = plan_batch(config, world.size)
    backend = create_backend(allocate_model(config.model, "meta"), config, world, plan)
    backend.draw_weights(config.run.seed)
    tokens = torch.randint(config.model.vocab_size, (plan.micro_batch_size, plan.seq_len), device=world.device)
    times = []
    for _ in range(steps):
        started, cpu_before = time.perf_counter(), _cpu_seconds()
        loss = backend.accumulate(tokens, tokens, world.size / plan.tokens_per_step, is_last=True)
        backend.step(config.optimizer.learning_rate)
        loss.item()
        times.append((time.perf_counter() - started, _cpu_seconds() - cpu_before))
    return backend, times


def _cpu_seconds() -> float:
    """Return the CPU seconds of all threads and of the compilers that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    run_command(main)

"""Measure how much longer a step takes because the ranks measure and compare their times.

torchrun --standalone --nproc_per_node=2 benchmarks/rank_times_cost.py --config ds_configs/ddp.json \
    ds_configs/quickstart.json
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from launch.cli import run_command
from pipeline.backends import Backend, create_backend
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.world import World, join_world
from pipeline.hardware.device import synchronize
from pipeline.model.gpt2 import allocate_model
from pipeline.run_folder.heartbeat_file import HeartbeatFile
from pipeline.training.rank_comparison import RankComparison

ORDER = (False, True, True, False)  # without and with measuring: A B B A
WAITS = 50  # collectives of a step without computation
IDLE_ROUNDS = 40


class Steps:
    """Trains on fixed tokens, or only waits in collectives, with or without the measurements of a run."""

    def __init__(self, config: Config, world: World, run_folder: Path) -> None:
        self.config, self.world = config, world
        self.plan = plan_batch(config, world.size)
        self.backend = create_backend(allocate_model(config.model, "meta"), config, world, self.plan)
        self.backend.draw_weights(config.run.seed)
        self.comparison = RankComparison(self.backend.step_clock, world, slow_ratio=None)
        self.heartbeat_file = HeartbeatFile(run_folder if world.is_main else None)
        groups = [dist.new_group([rank]) for rank in range(world.size)]  # every rank must create every group
        self.alone = groups[world.rank]

    def seconds(self, step: Callable[[], None], clock: Callable[[], float], *, measures: bool) -> float:
        self.world.barrier()
        started = clock()
        every_steps = self.config.logging.every_steps
        for number in range(every_steps):
            if measures:
                self.heartbeat_file.enter("training", number)
                with self.backend.step_clock.step():
                    with self.backend.step_clock.waiting_for_data():
                        pass
                    step()
            else:
                step()
        if measures:
            self.comparison.start()
        synchronize(self.world.device)
        if measures:
            self.comparison.read()
        return (clock() - started) / every_steps

    def rounds(self, step: Callable[[], None], clock: Callable[[], float], count: int) -> list[list[float]]:
        """Return the seconds per step of each round of ``ORDER``. An extra first round allocates and compiles."""
        rounds = [[self.seconds(step, clock, measures=measures) for measures in ORDER] for _ in range(count + 1)]
        return rounds[1:]

    def train(self) -> None:
        shape = (self.plan.micro_batch_size, self.plan.seq_len)
        tokens = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
        for i in range(self.plan.accumulation):
            loss = self.backend.accumulate(
                tokens, tokens, self.world.size / self.plan.tokens_per_step, is_last=i == self.plan.accumulation - 1
            )
        self.world.sum(loss)
        self.backend.step(self.config.optimizer.learning_rate)

    def wait(self) -> None:
        """Wait in ``WAITS`` collectives of a group of this rank alone."""
        value = torch.zeros((), device=self.world.device)
        for _ in range(WAITS):
            dist.all_reduce(value, group=self.alone)


def main() -> Backend:
    """Return the backend, which ``run_command`` keeps in memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=25, help="A B B A with training steps; 0 skips them")
    arguments = parser.parse_args()
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    config = load_config(arguments.config, arguments.set)
    with join_world(config.run) as world, tempfile.TemporaryDirectory() as folder:
        configure_cpu(world)
        steps = Steps(config, world, Path(folder))
        idle = steps.rounds(steps.wait, time.thread_time, IDLE_ROUNDS)
        if world.is_main:
            added_us = statistics.median((b1 + b2 - a1 - a2) / 2 * 1e6 for a1, b1, b2, a2 in idle)
            print(f"a step with {WAITS} collectives: {added_us:.0f} us more CPU time of the main thread", flush=True)
        if arguments.rounds:
            real = steps.rounds(steps.train, time.perf_counter, arguments.rounds)
            if world.is_main:
                print(describe(real), flush=True)
        world.barrier()
    return steps.backend


def describe(rounds: list[list[float]]) -> str:
    """Return the time per step, and the additional time with its standard error."""
    step_ms = statistics.median((a1 + a2) / 2 * 1e3 for a1, _, _, a2 in rounds)
    added = [(b1 + b2) / (a1 + a2) - 1 for a1, b1, b2, a2 in rounds]
    error = statistics.stdev(added) / math.sqrt(len(added))
    return (
        f"a training step: {step_ms:.1f} ms, with measuring {statistics.mean(added):+.2%} (standard error {error:.2%})"
    )


if __name__ == "__main__":
    run_command(main)

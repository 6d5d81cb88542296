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
from pathlib import Path

import torch

from launch.cli import run_command
from pipeline.backends import Backend, create_backend
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.device import synchronize
from pipeline.distributed.world import World, join_world
from pipeline.model.gpt2 import build_model
from pipeline.run_folder.heartbeat_file import HeartbeatFile
from pipeline.training.rank_comparison import RankComparison

ORDER = (False, True, True, False)  # without and with measuring: A B B A


class Steps:
    """Trains on random tokens, with or without the measurements of a run."""

    def __init__(self, config: Config, world: World, run_folder: Path) -> None:
        self.config, self.world = config, world
        self.plan = plan_batch(config, world.size)
        self.backend = create_backend(build_model(config.model, config.run.seed), config, world, self.plan)
        self.comparison = RankComparison(self.backend.step_clock, world, slow_ratio=None)
        self.heartbeat_file = HeartbeatFile(run_folder if world.is_main else None)

    def seconds(self, *, measures: bool) -> float:
        """Return the time of the steps between two rows of metrics."""
        self.world.barrier()
        started = time.perf_counter()
        for step in range(self.config.logging.every_steps):
            if measures:
                self.heartbeat_file.enter("training", step)
                with self.backend.step_clock.step():
                    with self.backend.step_clock.waiting_for_data():
                        pass
                    self._train()
            else:
                self._train()
        if measures:
            self.comparison.start()
        synchronize(self.world.device)
        if measures:
            self.comparison.read()
        return time.perf_counter() - started

    def _train(self) -> None:
        shape = (self.plan.micro_batch_size, self.plan.seq_len)
        tokens = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
        for i in range(self.plan.accumulation):
            loss = self.backend.accumulate(
                tokens, tokens, self.world.size / self.plan.tokens_per_step, is_last=i == self.plan.accumulation - 1
            )
        self.world.sum(loss)
        self.backend.step(self.config.optimizer.learning_rate)


def main() -> Backend:
    """Measure and print one line. Returns the backend, which ``run_command`` keeps in memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=25, help="repetitions of A B B A")
    arguments = parser.parse_args()
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    config = load_config(arguments.config, arguments.set)
    with join_world(config.run) as world, tempfile.TemporaryDirectory() as folder:
        configure_cpu(world)
        steps = Steps(config, world, Path(folder))
        for measures in ORDER:
            steps.seconds(measures=measures)  # the first steps allocate
        rounds = [[steps.seconds(measures=measures) for measures in ORDER] for _ in range(arguments.rounds)]
        if world.is_main:
            print(describe(rounds, config.logging.every_steps))
        world.barrier()
    return steps.backend


def describe(rounds: list[list[float]], steps: int) -> str:
    """Return the time per step, and the additional time with its standard error, from rounds of A B B A."""
    plain = [first + last for first, _, _, last in rounds]
    added = [(b1 + b2) / (first + last) - 1 for first, b1, b2, last in rounds]
    error = statistics.stdev(added) / math.sqrt(len(added))
    return (
        f"step {1e3 * statistics.median(plain) / 2 / steps:.1f} ms, additional time: median "
        f"{statistics.median(added):+.3%}, mean {statistics.mean(added):+.3%} (standard error {error:.3%})"
    )


if __name__ == "__main__":
    run_command(main)

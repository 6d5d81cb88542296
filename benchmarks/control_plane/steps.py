"""Measure what each rank does per step or per row of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.shards.reader import open_split
from pipeline.data.batch_plan import BatchPlan
from pipeline.data.datasets import TokenDataset
from pipeline.data.loader import TrainLoader
from pipeline.distributed.step_clock import StepClock
from pipeline.distributed.world import World
from pipeline.training.rank_comparison import RankComparison
from tests.support.shard_folders import write_folder

SEQ_LEN = 16
ACCUMULATION = 2
SLOW_RANK = 7


def measure_loader(ranks: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Create the loader of each rank, and read one step with it. All ranks together must read each sample once."""
    plan = BatchPlan(micro_batch_size=1, seq_len=SEQ_LEN, accumulation=ACCUMULATION, world_size=ranks)
    tokens = np.arange(plan.samples_per_step * SEQ_LEN + 1, dtype=np.uint64) // SEQ_LEN  # names the sample
    write_folder(folder / "data", [(tokens % 50000).astype(np.uint16)])
    dataset = TokenDataset("data", str(folder / "data"), 1.0, open_split(folder / "data", "train"), None)
    started = time.thread_time()
    firsts: list[int] = []
    windows: list[int] = []
    for rank in range(ranks):
        for batch in TrainLoader([dataset], plan, seed=1, rank=rank).micro_batches(0):
            firsts.append(batch.first_sample)
            windows += batch.tokens[:, 0].tolist()
    seconds = time.thread_time() - started
    expected = [number % 50000 for number in range(plan.samples_per_step)]
    assert sorted(firsts) == list(range(plan.samples_per_step)) and sorted(windows) == sorted(expected)
    yield "loader: CPU time to create it and read the first step, per rank", f"{1e6 * seconds / ranks:.0f} us"


class SimulatedWorld(World):
    """Rank 0 of many ranks. Collectives return at once. One rank reports slow steps."""

    def gather(self, item: Any) -> list[Any]:
        """Return the host of each rank, with eight ranks per host."""
        return [f"node{rank // 8}" for rank in range(self.size)]

    def sum(self, values: Tensor) -> Tensor:
        times = torch.tensor([0.4, 0.01, 0.05]).repeat(self.size, 1)
        times[SLOW_RANK, 0] = 0.6
        return times


def measure_metrics(ranks: int) -> Iterator[tuple[str, str]]:
    world = SimulatedWorld(0, ranks, 0, torch.device("cpu"))
    comparison = RankComparison(StepClock(world.device, is_active=True), world, slow_ratio=None)
    comparison.start()
    started = time.thread_time()
    row = comparison.read()
    seconds = time.thread_time() - started
    assert row["slowest_rank"] == SLOW_RANK and row["slowest_host"] == "node0"
    yield "metrics: CPU time to compare the step times of all ranks, per row", f"{1e3 * seconds:.1f} ms"

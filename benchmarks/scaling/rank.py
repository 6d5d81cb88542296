"""Measure steps, and what a prediction of these steps needs: computation without communication, and the link.

Each rank runs this script. The main rank prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import psutil
import torch
import torch.distributed as dist

from launch.cli import run_command
from pipeline.backends import Backend, create_backend, fsdp
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.world import World, join_world
from pipeline.model.gpt2 import allocate_model

WARM_UP = 2  # DDP rebuilds its buckets in the second step
SMALL_BYTES, LARGE_BYTES = 64, 4 << 20
LINK_ROUNDS = 15
STRETCHES = 16  # about as many as the collectives of a step of FSDP2
PRODUCTS, PRODUCT_SIZE = 4, 512  # per stretch; a stretch takes about as long as the computation of one block


class Steps:
    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.plan = plan_batch(config, world.size)
        self.backend = create_backend(allocate_model(config.model, "meta"), config, world, self.plan)
        self.backend.draw_weights(config.run.seed)
        self._tokens = torch.zeros((self.plan.micro_batch_size, self.plan.seq_len), dtype=torch.int64)

    def compute(self, *, is_last: bool) -> None:
        """Run the forward and backward pass of one micro-batch."""
        weight = self.world.size / self.plan.tokens_per_step
        self.backend.accumulate(self._tokens, self._tokens, weight, is_last=is_last)

    def update(self) -> None:
        self.backend.step(self.config.optimizer.learning_rate)

    def train(self) -> None:
        self.compute(is_last=True)
        self.update()


@contextmanager
def fsdp_sends_nothing() -> Iterator[None]:
    """Replace the transfers between ranks. Each rank uses its own shard in place of the shards of other ranks."""

    def copy(sent: Sequence[torch.Tensor], received: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
        for tensor in received:
            if not tensor.is_set_to(sent[group.rank()]):
                tensor.copy_(sent[group.rank()])

    with patch.object(fsdp, "_exchange", copy):
        yield


def seconds(world: World, call: Callable[[], object]) -> float:
    """Return the time of a call from the common start of all ranks to the end of the last rank."""
    world.barrier()
    started = time.perf_counter()
    call()
    return max(world.gather(time.perf_counter() - started))


def measure_link(world: World) -> dict[str, float]:
    """Return the bandwidth and the latency of a ring, and the seconds that a rank waits for the slowest rank."""
    small, large = (torch.zeros(size // 4) for size in (SMALL_BYTES, LARGE_BYTES))
    matrix = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE)

    def compute_in_stretches(*, waits: bool) -> None:
        for _ in range(STRETCHES):
            for _ in range(PRODUCTS):
                torch.mm(matrix, matrix)
            if waits:
                dist.all_reduce(small)

    def fastest(call: Callable[[], object]) -> float:
        return min(seconds(world, call) for _ in range(LINK_ROUNDS))

    small_s, large_s = (fastest(partial(dist.all_reduce, tensor)) for tensor in (small, large))
    waiting_s, computing_s = (fastest(partial(compute_in_stretches, waits=waits)) for waits in (True, False))
    messages = 2 * (world.size - 1)
    return {
        "latency_s": small_s / messages,
        "bytes_per_s": messages / world.size * LARGE_BYTES / max(large_s - small_s, 1e-9),
        "straggler_s": max((waiting_s - computing_s) / STRETCHES - small_s, 0.0),
    }


def sent_bytes(interface: str) -> int:
    """Return how many bytes this host has sent over a network interface."""
    return int(psutil.net_io_counters(pernic=True)[interface].bytes_sent)


def measure(world: World, arguments: argparse.Namespace) -> tuple[dict[str, object], list[Backend]]:
    """Return the measured values, and the backends, which must stay in memory until the process ends.

    The fastest round counts, because other programs only make a round slower.
    """
    every = {name: Steps(load_config(arguments.config, [f"backend.name={name}"]), world) for name in arguments.backends}
    for steps in every.values():
        for _ in range(WARM_UP):
            steps.train()
    alone = every["ddp"]  # without a synchronization of gradients, DDP does not communicate
    rounds: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        rounds.setdefault(name, []).append(value)

    for _ in range(arguments.steps):
        for name, steps in every.items():
            before = sent_bytes(arguments.interface)
            add(name, seconds(world, steps.train))
            add(f"{name}_sent_bytes", sent_bytes(arguments.interface) - before)
        add("ddp_pass_s", seconds(world, lambda: alone.compute(is_last=False)))
        with fsdp_sends_nothing():
            add("fsdp_pass_s", seconds(world, lambda: every["fsdp"].compute(is_last=True)))
        alone.compute(is_last=True)
        add("update_s", seconds(world, alone.update))
    link = measure_link(world) if world.size > 1 else {}
    return {"link": link, **{name: min(values) for name, values in rounds.items()}}, [
        steps.backend for steps in every.values()
    ]


def main() -> list[Backend]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--backends", nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--interface", default="lo")
    arguments = parser.parse_args()
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    with join_world(load_config(arguments.config).run) as world:
        configure_cpu(world)
        result, backends = measure(world, arguments)
        if world.is_main:
            print(json.dumps(result), flush=True)
        world.barrier()
    return backends


if __name__ == "__main__":
    run_command(main)

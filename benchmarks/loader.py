"""Measure the data loader: batches per second, memory, the time of a seek, and how long training waits for data.

python -m benchmarks.loader      # what `make bench-loader` runs; run nothing else; takes about five minutes

The peer is like build-nanogpt's loader: it keeps a whole shard in memory as int64 and slices it in order.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.memory import status_bytes
from data_tools.shards.manifest import TRAIN_SPLIT, TokenizerRecord
from data_tools.shards.reader import TokenStream, open_split
from data_tools.shards.writer import ShardWriter
from data_tools.vocabulary import END_OF_TEXT, GPT2_VOCAB_SIZE
from pipeline.backends import create_backend
from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan, plan_batch
from pipeline.data.datasets import TokenDataset, open_datasets, tokenizer_of
from pipeline.data.loader import MicroBatch, Prefetcher, TrainLoader
from pipeline.distributed.world import join_world
from pipeline.model.gpt2 import allocate_model, flops_per_token
from pipeline.training.resuming import load_start
from pipeline.training.throughput import ThroughputMeter
from pipeline.training.trainer import Trainer
from tests.support.runs import write_manifest
from tests.support.tables import print_header, print_row

MB = 10**6
SHARD_TOKENS = 100_000_000  # the default of build-nanogpt and of stage 1
BATCH, SEQ_LEN, ACCUMULATION = 16, 1024, 32  # 524,288 tokens per step, as in the GPT-2 recipe
BATCHES = SHARD_TOKENS // (BATCH * SEQ_LEN) - 1  # the batches in one shard, without the end of the shard
CPU = torch.device("cpu")
FAR_SAMPLE, FAR_TOKENS = 10**9, 10**10
MIXTURE = (0.5, 0.25, 0.15, 0.07, 0.03)

Batch = tuple[Tensor, Tensor]  # inputs and targets, (B, T) int64


def make_shards(folder: Path, tokens: int) -> Path:
    """Write shards of random tokens with an end of text every thousand tokens."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    records = []
    for index in range(-(-tokens // SHARD_TOKENS)):
        size = min(SHARD_TOKENS, tokens - index * SHARD_TOKENS)
        shard = draw.integers(0, END_OF_TEXT, size, dtype=np.uint16)
        shard[::1000] = END_OF_TEXT
        writer = ShardWriter(folder, f"{TRAIN_SPLIT}_{index:06d}.npy", TRAIN_SPLIT)
        writer.append(shard, documents=len(shard[::1000]), utf8_bytes=0)
        records.append(writer.close())
    write_manifest(folder, "random", TokenizerRecord("random", GPT2_VOCAB_SIZE, END_OF_TEXT, "0" * 64), records)
    return folder


def our_batches(folder: Path) -> Iterator[Batch]:
    """Yield shuffled windows of the whole split, from memory-mapped files."""
    dataset = TokenDataset("data", str(folder), 1.0, open_split(folder, TRAIN_SPLIT), None)
    loader = TrainLoader([dataset], BatchPlan(BATCH, SEQ_LEN, ACCUMULATION, 1), seed=1337, rank=0)
    for step in itertools.count():
        for micro_batch in loader.micro_batches(step * loader.plan.samples_per_step):
            yield micro_batch.to(CPU)


def slices_in_order(folder: Path) -> Iterator[Batch]:
    length = BATCH * SEQ_LEN
    while True:
        for path in sorted(folder.glob("*.npy")):
            tokens = torch.from_numpy(np.load(path).astype(np.int64))
            for start in range(0, len(tokens) - length, length):
                piece = tokens[start : start + length + 1]
                yield piece[:-1].view(BATCH, SEQ_LEN), piece[1:].view(BATCH, SEQ_LEN)


LOADERS: dict[str, Callable[[Path], Iterator[Batch]]] = {"this loader": our_batches, "slices in order": slices_in_order}


def measure_loader(name: str, folder: Path) -> list[str]:
    """Read as many batches as one shard contains. Returns the cells of a table row."""
    own_bytes, mapped_bytes = status_bytes("RssAnon"), status_bytes("RssFile")
    started = time.perf_counter()
    batches = LOADERS[name](folder)
    next(batches)
    first_s = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(BATCHES - 1):
        inputs, targets = next(batches)
        assert inputs.shape == targets.shape == (BATCH, SEQ_LEN)
    others_s = time.perf_counter() - started
    return [
        f"{first_s * 1e3:,.0f} ms",
        f"{(BATCHES - 1) / others_s:,.0f}",
        f"{BATCHES / (first_s + others_s):,.0f}",
        f"{(status_bytes('RssAnon') - own_bytes) / MB:,.0f} MB",
        f"{(status_bytes('RssFile') - mapped_bytes) / MB:,.0f} MB",
    ]


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_speeds(folder: Path) -> None:
    """Print the speed of each loader from a cold disk, then from a warm cache."""
    print(f"{BATCHES:,} batches of {BATCH} x {SEQ_LEN} tokens: one shard\n")
    columns = ("files", "first batch", "batches/s after it", "batches/s in all", "own memory", "mapped files")
    print_header("loader", *columns)
    spawn = multiprocessing.get_context("spawn")
    for files in ("on disk", "cached"):
        for name in LOADERS:
            if files == "on disk":
                drop_from_cache(folder)
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                print_row(name, files, *process.submit(measure_loader, name, folder).result())


class EndlessStream:
    """A token stream whose tokens are all zero. It can have any size, because it needs no file."""

    has_mask = False
    split = TRAIN_SPLIT
    tokens = FAR_TOKENS

    def read_windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.uint16]:
        assert starts.min() >= 0 and starts.max() + length <= self.tokens
        return np.zeros((len(starts), length), dtype=np.uint16)


def seek_ms(weights: tuple[float, ...]) -> float:
    """Return the median time of nine seeks. A seek constructs a loader and reads the batch at ``FAR_SAMPLE``."""
    stream = cast(TokenStream, EndlessStream())
    times = []
    for seed in range(9):
        started = time.perf_counter()
        datasets = [TokenDataset(str(index), "none", weight, stream, None) for index, weight in enumerate(weights)]
        loader = TrainLoader(datasets, BatchPlan(BATCH, SEQ_LEN, 1, 1), seed, rank=0)
        (batch,) = loader.micro_batches(FAR_SAMPLE)
        times.append(time.perf_counter() - started)
        assert batch.first_sample == FAR_SAMPLE
    return statistics.median(times) * 1e3


def print_seeks() -> None:
    print(f"\nThe batch at sample {FAR_SAMPLE:,}, of datasets of {FAR_TOKENS:,} tokens\n")
    print_header("data", "seek")
    print_row("one dataset", f"{seek_ms((1.0,)):.2f} ms")
    print_row(f"mixture of {len(MIXTURE)}", f"{seek_ms(MIXTURE):.2f} ms")


class Unprefetched:
    """Replaces the prefetcher, but does not read ahead."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def micro_batches(self, consumed: int) -> list[MicroBatch]:
        return self.loader.micro_batches(consumed)


def print_waits(folder: Path, scratch: Path, rounds: int) -> None:
    """Print the time that real training steps wait for data, with and without reading ahead."""
    print("\nTraining steps of 1 x 256 tokens in fp32 on this CPU, median of alternating rounds\n")
    print_header("model", "reading ahead", "step", "of it waiting for data")
    for preset, steps in (("gpt2-tiny", 20), ("gpt2", 3)):
        for ahead, readings in waits_of(preset, steps, folder, scratch / preset, rounds).items():
            step_ms = statistics.median(reading["step_ms"] for reading in readings)
            share = statistics.median(reading["data_wait_share"] for reading in readings)
            print_row(preset, "yes" if ahead else "no", f"{step_ms:,.1f} ms", f"{share:.4%}")


def waits_of(preset: str, steps: int, folder: Path, run_folder: Path, rounds: int) -> dict[bool, list[dict[str, Any]]]:
    config = Config.model_validate(
        {
            "run": {"out_dir": str(run_folder), "device": "cpu", "precision": "fp32"},
            "model": {"preset": preset},
            "data": {"path": str(folder), "seq_len": 256},
            "batch": {"tokens_per_step": 256, "micro_batch_size": 1},
            "logging": {"sinks": ["jsonl", "console"]},
        }
    )
    readings: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    run_folder.mkdir()
    with join_world(config.run) as world:
        plan = plan_batch(config, world.size)
        datasets = open_datasets(config)
        loader = TrainLoader(datasets, plan, config.run.seed, world.rank)
        backend = create_backend(allocate_model(config.model, "meta"), config, world, plan)
        backend.draw_weights(config.run.seed)
        flops = flops_per_token(config.model, config.seq_len)
        throughput = ThroughputMeter(plan.tokens_per_step, flops, 1.0, world.device)
        state = load_start(None, config, "0" * 64, tokenizer_of(datasets), backend, world)
        trainer = Trainer(config, world, backend, loader, throughput, state, tasks={})
        prefetcher = trainer.prefetcher
        trainer.train_step().loss.read()  # the first step allocates
        for _ in range(rounds):
            for ahead in readings:
                trainer.prefetcher = prefetcher if ahead else cast(Prefetcher, Unprefetched(loader))
                trainer.train_step()
                throughput.restart()
                for _ in range(steps):
                    trainer.train_step()
                readings[ahead].append(throughput.read())
        prefetcher.close()
    return readings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="size of the synthetic dataset")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of training steps, with and without reading ahead"
    )
    arguments = parser.parse_args()
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_shards(Path(scratch) / "data", arguments.tokens)
        print_speeds(folder)
        print_seeks()
        print_waits(folder, Path(scratch), arguments.rounds)


if __name__ == "__main__":
    main()

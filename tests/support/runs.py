"""Run ``launch/train.py`` in separate processes on small data, and read its curve."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.run import tokenize_corpus
from data_tools.shards.manifest import (
    MANIFEST_NAME,
    TRAIN_SPLIT,
    VAL_SPLIT,
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    load_manifest,
)
from data_tools.shards.reader import open_split
from data_tools.shards.writer import ShardWriter
from data_tools.storage.atomic import write_json_durably
from pipeline.run_folder.metrics import read_metrics
from tests.support.rank_server import RankServer

REPOSITORY = Path(__file__).resolve().parents[2]
#: PYTHONPATH for child processes: this checkout, and then the caller's folders.
PYTHON_PATH = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
CONFIGS = REPOSITORY / "ds_configs"
TRAIN = REPOSITORY / "launch" / "train.py"

#: The backends whose curves must agree, by the name of their config.
BACKENDS = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")

#: Overrides of a config: section -> key -> value.
Sections = dict[str, dict[str, Any]]

#: Backends with groups of two ranks, see ``split_config``.
GROUPED = ("fsdp/2", "zero3/2")

#: The section, the key for the size of the groups of ranks that hold a copy of the weights, and other keys. By default,
#: ZeRO-3 never frees small parameters, and then tiny models have no secondary shards.
GROUP_KEYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fsdp": ("backend.fsdp", "shard_group_size", {}),
    "zero3": (
        "backend.deepspeed.zero_optimization",
        "zero_hpz_partition_size",
        {"stage3_param_persistence_threshold": 0},
    ),
}

#: A run whose steps take a fraction of a second on one core, with clipping active.
TINY_RUN: Sections = {
    "run": {"precision": "fp32", "device": "cpu"},
    "model": {"preset": "gpt2-tiny", "n_layer": 2, "n_head": 3, "n_embd": 51, "context_length": 48},
    "batch": {"tokens_per_step": 384, "micro_batch_size": 2},
    "optimizer": {"learning_rate": 1e-3, "grad_clip": 0.5},
    "schedule": {"warmup_steps": 5, "max_steps": 20},
    "checkpoint": {"every_steps": 1000},
    "evaluation": {"every_steps": 1000, "max_batches": 4},
    "logging": {"every_steps": 1, "sinks": ["jsonl", "console"]},
}

#: One token per byte value, and END_OF_TEXT.
BYTE_VOCAB_SIZE = 257

#: The same for the data of ``make_byte_corpus``. The output layer is small, so steps are several times faster.
TINY_BYTE_RUN: Sections = {**TINY_RUN, "model": {**TINY_RUN["model"], "vocab_size": BYTE_VOCAB_SIZE}}


@dataclass(frozen=True)
class Curve:
    """The losses and gradient norms that a run logged, one per step."""

    losses: list[float]
    grad_norms: list[float]

    def after(self, step: int) -> Curve:
        return Curve(self.losses[step:], self.grad_norms[step:])

    def largest_loss_difference(self, other: Curve) -> float:
        """Return the largest absolute difference in loss, in nats."""
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))

    def largest_grad_norm_difference(self, other: Curve) -> float:
        """Return the largest difference in gradient norm, relative to ``other``."""
        return max(abs(a - b) / b for a, b in zip(self.grad_norms, other.grad_norms, strict=True))


def make_corpus(folder: Path, documents: int = 60) -> Path:
    """Write token shards of real text: the first files of the Python standard library."""
    tokenize_corpus(
        TokenizeRequest(source="python-stdlib", out=folder, limit_documents=documents, val_fraction=0.05, workers=1)
    )
    return folder


def make_byte_corpus(folder: Path, documents: int = 60) -> Path:
    """Write the same text with one token per byte, for ``TINY_BYTE_RUN``."""
    folder.mkdir(parents=True)
    texts = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:documents]]
    records = []
    for split, chosen in ((TRAIN_SPLIT, texts[1:]), (VAL_SPLIT, texts[:1])):
        writer = ShardWriter(folder, f"{split}_000000.npy", split)
        for text in chosen:
            tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
            writer.append(
                np.concatenate([[BYTE_VOCAB_SIZE - 1], tokens]).astype(np.uint16), documents=1, utf8_bytes=len(text)
            )
        records.append(writer.close())
    tokenizer = TokenizerRecord("bytes", BYTE_VOCAB_SIZE, BYTE_VOCAB_SIZE - 1, "0" * 64)
    write_manifest(folder, "python-stdlib", tokenizer, records)
    return folder


def write_manifest(folder: Path, source: str, tokenizer: TokenizerRecord, records: Sequence[ShardRecord]) -> None:
    """Write the manifest of shards that were not made by stage 1."""
    manifest = Manifest(tokenizer=tokenizer, source=SourceRecord(source, {}), settings={}, shards=tuple(records))
    write_json_durably(folder / MANIFEST_NAME, manifest.to_json())


def copy_with_masks(data: Path, folder: Path, longest_tokens: int = 100) -> Path:
    """Copy a dataset and add masks: prompts and answers of 1 to ``longest_tokens`` tokens alternate.

    Only answers are scored.
    """
    folder.mkdir(parents=True)
    manifest = load_manifest(data)
    records = []
    for split in manifest.splits():
        stream = open_split(data, split)
        ends = np.random.default_rng(0).integers(1, longest_tokens, stream.tokens, endpoint=True).cumsum()
        scored = np.searchsorted(ends, np.arange(stream.tokens), side="right") % 2 == 1
        writer = ShardWriter(folder, f"{split}_000000.npy", split)
        writer.append(
            stream.read(0, stream.tokens), documents=stream.documents, utf8_bytes=stream.utf8_bytes, scored=scored
        )
        records.append(writer.close())
    write_json_durably(folder / MANIFEST_NAME, replace(manifest, shards=tuple(records)).to_json())
    return folder


def ranks_command(processes: int, script: Path, arguments: Sequence[str], launcher: Sequence[str] = ()) -> list[str]:
    """Return the command for a script: python for one process, torchrun (with options ``launcher``) for more."""
    command = [sys.executable]
    if processes > 1 or launcher:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *launcher]
    return [*command, str(script), *arguments]


def run_ranks(
    processes: int, script: Path, arguments: Sequence[str], timeout_s: float = 600, folder: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end in ``folder``, on forked ranks with one thread per process."""
    environment = child_environment()
    with tempfile.TemporaryDirectory() as temporary:
        outputs = Path(temporary)
        status = _rank_server().run(processes, script, arguments, environment, outputs, timeout_s, folder)
        stdout, stderr = ((outputs / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([str(script), *arguments], status, stdout, stderr)


@functools.cache
def _rank_server() -> RankServer:
    return RankServer(REPOSITORY, child_environment())


def child_environment() -> dict[str, str]:
    """Return the caller's environment with this checkout on the path, one thread, and no warnings of libraries."""
    return {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def overrides(sections: Sections) -> list[str]:
    """Return ``{"run": {"seed": 1}}`` as ``["run.seed=1"]``."""
    return [f"{section}.{key}={json.dumps(value)}" for section, keys in sections.items() for key, value in keys.items()]


def split_config(config: str) -> tuple[str, Sections]:
    """Return ``fsdp`` and config sections for ``fsdp/2``, with which each group of two ranks holds all weights."""
    name, _, size = config.partition("/")
    if not size:
        return name, {}
    section, key, others = GROUP_KEYS[name]
    return name, {section: {key: int(size), **others}}


def train_arguments(config: str, run_folder: Path, sections: Sections) -> list[str]:
    """Return the options of ``launch/train.py`` for ``ds_configs/<config>.json`` with overrides.

    ``config`` is a name such as ``fsdp``, or ``fsdp/2`` for groups of two ranks.
    """
    name, groups = split_config(config)
    sets = [*overrides(merged(groups, sections)), f"run.out_dir={run_folder}"]
    return ["--config", str(CONFIGS / f"{name}.json"), "--set", *sets]


def train_run(
    config: str, run_folder: Path, sections: Sections, processes: int = 1, script: Path = TRAIN
) -> subprocess.CompletedProcess[str]:
    """Train to the last step. Return the exit status and the output."""
    return run_ranks(processes, script, train_arguments(config, run_folder, sections))


def curve_of(config: str, run_folder: Path, sections: Sections, processes: int = 1, script: Path = TRAIN) -> Curve:
    """Train to the last step and return the curve from ``metrics.jsonl``.

    Raises:
        RuntimeError: the run failed. The message contains its output.
    """
    result = train_run(config, run_folder, sections, processes, script)
    if result.returncode:
        raise RuntimeError(f"{config} with {processes} processes failed:\n{result.stdout}\n{result.stderr}")
    return read_curve(run_folder)


def read_curve(run_folder: Path) -> Curve:
    rows = [row for row in read_metrics(run_folder) if "loss" in row]
    return Curve([row["loss"] for row in rows], [row["grad_norm"] for row in rows])


def last_logged_step(run_folder: Path) -> int:
    """Return the last training step in ``metrics.jsonl``, or 0."""
    return max((row["step"] for row in read_metrics(run_folder) if "loss" in row), default=0)


def merged(*layers: Sections) -> Sections:
    """Merge sections key by key. Later layers override earlier ones."""
    result: Sections = {}
    for layer in layers:
        for section, keys in layer.items():
            result[section] = {**result.get(section, {}), **keys}
    return result

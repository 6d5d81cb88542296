"""Compare planned memory with measured peaks and, at large world sizes, with the sizes of real shards.

python -m benchmarks.planned_memory            # what `make plan-check` runs; run nothing else on the machine
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from benchmarks.run_options import OPTIMIZERS
from benchmarks.wrapped_shards import WORLD_SIZES, compare_shards
from pipeline.config.loading import load_config
from pipeline.data.batch_plan import plan_batch
from pipeline.planning.memory import layout_of
from pipeline.planning.planner import peak_memory
from tests.support.rank_server import RankServer
from tests.support.runs import CONFIGS, REPOSITORY, Sections, child_environment, merged, overrides, ranks_command
from tests.support.tables import print_header, print_row

MIB = 1 << 20
LARGEST_DIFFERENCE = 0.10
RANK_SCRIPT = REPOSITORY / "benchmarks" / "memory_rank.py"

#: With these variables, glibc returns the memory of freed tensors at once. Resident memory is then memory in use.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}

#: In each model, another kind of memory is the largest: state, logits or activations. "gpt2" is for GPUs, and "small"
#: is for the tests.
MODELS: dict[str, Sections] = {
    "state": {"model": {"preset": "gpt2", "context_length": 128}, "batch": {"micro_batch_size": 2}},
    "logits": {
        "model": {"n_layer": 6, "n_head": 8, "n_embd": 512, "context_length": 512},
        "batch": {"micro_batch_size": 4},
    },
    "activations": {
        "model": {"n_layer": 8, "n_head": 6, "n_embd": 384, "context_length": 512, "vocab_size": 2000},
        "batch": {"micro_batch_size": 8},
    },
    "gpt2": {"model": {"preset": "gpt2", "context_length": 1024}, "batch": {"micro_batch_size": 8}},
    "small": {
        "model": {"n_layer": 3, "n_head": 4, "n_embd": 256, "context_length": 256, "vocab_size": 20000},
        "batch": {"micro_batch_size": 4},
    },
}
#: Small buckets, so that all buckets are filled. On a CPU, an unfilled bucket is not resident.
SMALL_BUCKETS = {"zero_optimization.reduce_bucket_size": 4_000_000}


#: Runs a script on several ranks and returns the exit status. The arguments are those of ``RankServer.run``.
RunRanks = Callable[[int, Path, Sequence[str], dict[str, str], Path, float], int]


@dataclass(frozen=True)
class Setting:
    backend: str
    world_size: int
    model: str
    precision: str = "amp_bf16"
    accumulation: int = 1
    checkpointing: bool | int = False
    optimizer: str = "adamw"

    def overrides(self) -> list[str]:
        size = MODELS[self.model]
        tokens = size["batch"]["micro_batch_size"] * size["model"]["context_length"] * self.world_size
        own: Sections = {
            "run": {"precision": self.precision},
            "optimizer": {"name": self.optimizer},
            "model": {"activation_checkpointing": self.checkpointing},
            "batch": {"tokens_per_step": tokens * self.accumulation},
        }
        partitions = self.backend.startswith("zero") and self.backend != "zero0"
        return overrides(merged(size, own, {"backend.deepspeed": SMALL_BUCKETS} if partitions else {}))


SETTINGS = (
    Setting("ddp", 1, "state"),
    Setting("ddp", 2, "state", accumulation=2),
    Setting("fsdp", 2, "state"),
    Setting("fsdp", 2, "state", "bf16", accumulation=2),
    Setting("zero1", 2, "state"),
    Setting("zero2", 2, "state", accumulation=2),
    Setting("zero3", 2, "state", "bf16"),
    Setting("zero0", 2, "logits", accumulation=2),
    Setting("zero1", 2, "logits", "bf16"),
    Setting("zero2", 2, "logits", "bf16"),
    Setting("ddp", 1, "logits", "fp32", accumulation=2),
    Setting("ddp", 1, "activations"),
    Setting("ddp", 1, "activations", checkpointing=True),
    Setting("ddp", 2, "activations", "bf16", checkpointing=2),
    Setting("fsdp", 2, "activations", checkpointing=True),
    Setting("zero3", 2, "activations"),
    Setting("fsdp", 1, "activations", "bf16"),
    Setting("zero2_offload", 1, "state"),
    Setting("zero3_offload", 2, "state", "bf16"),
    Setting("ddp", 2, "state", optimizer="muon"),
    Setting("fsdp", 2, "state", optimizer="muon"),
    Setting("zero1", 2, "state", optimizer="muon"),
    Setting("zero3", 2, "state", "bf16", optimizer="muon"),
)


@dataclass(frozen=True)
class Compared:
    setting: Setting
    planned_bytes: int
    measured_bytes: int

    @property
    def difference(self) -> float:
        return self.planned_bytes / self.measured_bytes - 1

    @property
    def agrees(self) -> bool:
        return abs(self.difference) <= LARGEST_DIFFERENCE

    def cells(self) -> list[object]:
        sizes = [f"{size / MIB:,.0f}" for size in (self.planned_bytes, self.measured_bytes)]
        *first, checkpointing, optimizer = astuple(self.setting)
        return [*first, json.dumps(checkpointing), optimizer, *sizes, f"{self.difference:+.1%}"]


def compare(setting: Setting, run_ranks: RunRanks, scratch: Path) -> Compared:
    config = load_config([CONFIGS / f"{setting.backend}.json"], setting.overrides())
    plan = plan_batch(config, setting.world_size)
    planned = peak_memory(config, plan).total
    if not torch.cuda.is_available():
        planned += layout_of(config, plan).host  # on a CPU, host and device share memory
    out = Path(tempfile.mkdtemp(dir=scratch))
    arguments = [str(out / "peak.json"), "--config", str(CONFIGS / f"{setting.backend}.json")]
    arguments += ["--set", *setting.overrides()]
    status = run_ranks(setting.world_size, RANK_SCRIPT, arguments, rank_environment(), out, 600)
    if status:
        command = " ".join(ranks_command(setting.world_size, RANK_SCRIPT, arguments))
        raise RuntimeError(f"{command} failed:\n{(out / 'stdout').read_text()}\n{(out / 'stderr').read_text()}")
    return Compared(setting, planned, json.loads((out / "peak.json").read_text())["peak_bytes"])


def rank_environment() -> dict[str, str]:
    """Return an environment in which glibc returns freed memory at once."""
    return {**child_environment(), **RETURN_FREED_MEMORY}


def start_ranks() -> RankServer:
    return RankServer(REPOSITORY, rank_environment())


def main() -> None:
    """Exit with a non-zero status if a measured size does not agree with the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--optimizer", nargs="+", default=OPTIMIZERS, choices=OPTIMIZERS, help="rows of the first table"
    )
    arguments = parser.parse_args()
    columns = ["backend", "ranks", "model", "precision", "micro-steps", "checkpointing", "optimizer"]
    print_header(*columns, "planned MiB", "measured MiB", "difference")
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        ranks = start_ranks()
        for setting in (setting for setting in SETTINGS if setting.optimizer in arguments.optimizer):
            compared = compare(setting, ranks.run, Path(scratch))
            failures += not compared.agrees
            print_row(*compared.cells())
    print()
    print_header("backend", "ranks", "state", "planned", "wrapped")
    for world_size in WORLD_SIZES:
        for shards in compare_shards(world_size):
            failures += not shards.agrees
            print_row(*shards.cells())
    raise SystemExit(f"{failures} settings do not agree" if failures else 0)


if __name__ == "__main__":
    main()

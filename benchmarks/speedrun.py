"""Measure the tokens and seconds that AdamW and Muon need to train a small GPT-2 to a validation loss.

python -m benchmarks.speedrun            # what `make speedrun` runs: 18 runs; run nothing else on the machine

Each contender has its own number of steps. At the last step, the learning rate has decayed, and the run evaluates.
docs/benchmarks/speedrun.md describes how the settings were found.

The command writes page.md and results.json to --out. If it is interrupted, repeat it: finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.train import run_script
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.run import tokenize_corpus
from data_tools.storage.atomic import write_bytes_durably, write_json_durably
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.model.gpt2 import parameter_count
from pipeline.run_folder.metrics import read_metrics
from tests.support.runs import CONFIGS, TRAIN, Sections, merged, train_arguments
from tests.support.tables import format_table

RESULTS_FILE, PAGE_FILE = "results.json", "page.md"

#: The validation loss, in nats, that every run must reach at its last step.
TARGET_LOSS = 4.25

BATCH_SEQUENCES, SEQUENCE_TOKENS = 8, 256

#: The settings of all contenders. The whole validation split is evaluated, before the first and after the last step.
COMMON: Sections = {
    "run": {"precision": "bf16", "device": "cpu", "compile": True},
    "model": {"preset": "gpt2-tiny", "n_layer": 6, "n_embd": 256, "context_length": SEQUENCE_TOKENS},
    "batch": {"tokens_per_step": BATCH_SEQUENCES * SEQUENCE_TOKENS},
    "checkpoint": {"every_steps": 1_000_000, "asynchronous": False},
    "evaluation": {"every_steps": 1_000_000, "max_batches": None},
    "logging": {"every_steps": 1, "tensorboard": False},
}

ADAMW: Sections = {"optimizer": {"name": "adamw", "learning_rate": 4e-3, "weight_decay": 1.0}}
MUON: Sections = {"optimizer": {"name": "muon", "learning_rate": 8e-3}}
COSINE: Sections = {"schedule": {"name": "cosine", "warmup_steps": 8, "max_steps": 96, "min_lr_ratio": 0.0}}
WSD: Sections = {"schedule": {**COSINE["schedule"], "name": "wsd", "decay_steps": 72}}
SHORT_WSD: Sections = {"schedule": {**WSD["schedule"], "warmup_steps": 3, "max_steps": 24, "decay_steps": 18}}

#: The optimizer and the schedule of each contender. The others are compared with the first.
CONTENDERS: dict[str, Sections] = {
    "AdamW, cosine": merged(ADAMW, COSINE),
    "AdamW, WSD": merged(ADAMW, WSD),
    "Muon, WSD": merged(MUON, SHORT_WSD),
}

#: A run of two steps, which fills torch's compile cache.
WARM_UP: Sections = {"schedule": {"name": "constant", "warmup_steps": 1, "max_steps": 2, "decay_steps": None}}

SIDES = (("ddp", 1), ("fsdp", 2))
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Case:
    """One run: a contender on a backend with a number of processes, and a seed of weights and data order."""

    backend: str
    processes: int
    contender: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.backend}-x{self.processes}-{self.contender.lower().replace(', ', '-')}-seed{self.seed}"

    def sections(self, data: Path, common: Sections) -> Sections:
        own: Sections = {
            "run": {"seed": self.seed},
            "data": {"path": str(data)},
            "batch": {"micro_batch_size": BATCH_SEQUENCES // self.processes},
        }
        return merged(COMMON, CONTENDERS[self.contender], own, common)


@dataclass(frozen=True)
class Result:
    case: Case
    settings: Sections  # if they have changed, the case runs again
    steps: int
    tokens: int
    val_loss: float
    train_s: float  # all steps, without evaluations. The first step loads the compiled code and counts as a mean step
    command_s: float  # the whole command

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Result:
        return cls(Case(**row.pop("case")), **row)


def run_case(case: Case, settings: Sections, folder: Path) -> Result:
    """Train a case from the start in an empty folder, and return its result."""
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    run_script(case.processes, TRAIN, train_arguments(case.backend, folder, settings))
    command_s = time.perf_counter() - started
    shutil.rmtree(folder / "checkpoints")  # the checkpoints of 18 runs would need 4 GB
    rows = read_metrics(folder)
    step_s = [row["step_ms"] / 1e3 for row in rows if "step_ms" in row]
    steps = len(step_s)
    tokens = steps * settings["batch"]["tokens_per_step"]
    val_loss = [row["val_loss"] for row in rows if "val_loss" in row][-1]
    return Result(case, settings, steps, tokens, val_loss, statistics.fmean(step_s[1:]) * steps, command_s)


def run_cases(cases: Sequence[Case], out: Path, common: Sections) -> list[Result]:
    """Run the cases that have no result yet. Returns the results of all cases.

    After each run, results.json and page.md are written. They contain all results whose settings have not changed.

    Args:
        common: settings that replace those of all runs.
    """
    data = make_quickstart_corpus(out / "data")
    path = out / RESULTS_FILE
    found = [Result.from_json(row) for row in json.loads(path.read_text())] if path.exists() else []
    results = {r.case: r for r in found if r.settings == r.case.sections(data, common)}
    warm: set[str] = set()  # backends whose compiled code is in torch's cache
    for case in cases:
        if case in results:
            continue
        settings = case.sections(data, common)
        if case.backend not in warm:
            warm.add(case.backend)
            run_case(case, merged(settings, WARM_UP), out / "warm-up")
        results[case] = run_case(case, settings, out / case.name)
        print(f"{case.name}: validation loss {results[case].val_loss:.4f}", file=sys.stderr, flush=True)
        write_json_durably(path, [vars(r) | {"case": vars(r.case)} for r in results.values()])
        write_bytes_durably(out / PAGE_FILE, render(results.values()).encode())
    return [results[case] for case in cases]


def make_quickstart_corpus(folder: Path) -> Path:
    """Tokenize the standard library as `make quickstart` does. If the folder is already complete, do nothing."""
    settings = load_config([CONFIGS / "quickstart.json"]).tokenize
    tokenize_corpus(TokenizeRequest(**settings.model_dump(exclude={"input"}, exclude_none=True), out=folder, workers=1))
    return folder


def render(results: Iterable[Result]) -> str:
    """Return the page: a summary per backend and contender, and a table of all runs."""
    ordered = sorted(results, key=lambda r: (side(r), list(CONTENDERS).index(r.case.contender), r.case.seed))
    config = Config.model_validate(ordered[0].settings)
    model, vocabulary = config.model, config.model.vocab_size * config.model.n_embd
    blocks = [
        "# Time to a validation loss",
        f"GPT-2 with {model.n_layer} layers of width {model.n_embd}: {parameter_count(model) / 1e6:.1f}M parameters, "
        f"{vocabulary / 1e6:.1f}M of them in the output layer; {config.batch.tokens_per_step:,} tokens per step; "
        f"{config.run.precision}; torch {torch.__version__}. The target is a validation loss of {TARGET_LOSS}. Figures "
        "are the mean ± the standard deviation over the seeds. Ratios compare with the first contender on the same "
        "backend.",
        format_table(SUMMARY_COLUMNS, summarize(ordered)),
        format_table(
            ("backend", "contender", "seed", "validation loss", "s of training", "s of the command"),
            [
                (side(r), r.case.contender, r.case.seed, f"{r.val_loss:.4f}", f"{r.train_s:.1f}", f"{r.command_s:.1f}")
                for r in ordered
            ],
        ),
    ]
    return "\n\n".join(blocks) + "\n"


SUMMARY_COLUMNS = (
    *("backend", "contender", "steps", "tokens", "ratio", "validation loss", "reached"),
    *("s of training", "ratio", "s of the command", "ratio"),
)


def side(result: Result) -> str:
    return f"{result.case.backend} x{result.case.processes}"


def summarize(results: Sequence[Result]) -> Iterable[Sequence[object]]:
    for place in dict.fromkeys(map(side, results)):
        groups: dict[str, list[Result]] = {}
        for result in results:
            if side(result) == place:
                groups.setdefault(result.case.contender, []).append(result)
        first = next(iter(groups.values()))
        for name, group in groups.items():
            reached = sum(result.val_loss <= TARGET_LOSS for result in group)
            yield (
                *(place, name, group[0].steps, f"{group[0].tokens:,}", ratio("tokens", group, first)),
                *(spread("val_loss", group, 4), f"{reached} of {len(group)} seeds"),
                *(spread("train_s", group, 1), ratio("train_s", group, first)),
                *(spread("command_s", group, 1), ratio("command_s", group, first)),
            )


def spread(figure: str, group: Sequence[Result], digits: int) -> str:
    values = [getattr(result, figure) for result in group]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def ratio(figure: str, group: Sequence[Result], first: Sequence[Result]) -> str:
    """Return the mean of a figure in a group, divided by its mean in the group ``first``."""
    mean, base = (statistics.fmean(getattr(result, figure) for result in some) for some in (group, first))
    return f"{mean / base:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Exit with a non-zero status if a run does not reach the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/speedrun"), help="default: %(default)s")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--backends", nargs="+", default=[name for name, _ in SIDES], choices=[s for s, _ in SIDES])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args(argv)
    sides = [side for side in SIDES if side[0] in arguments.backends]
    # Seeds are the outer loop, so that a change in the speed of the machine affects all contenders.
    cases = [Case(*side, name, seed) for seed, side, name in product(arguments.seeds, sides, arguments.contenders)]
    results = run_cases(cases, arguments.out, {})
    print(render(results), end="")
    missed = [result.case.name for result in results if result.val_loss > TARGET_LOSS]
    raise SystemExit(f"these runs do not reach the target: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()

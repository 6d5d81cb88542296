"""Compare the training speed of this project with transformers and other trainers, one after the other.

python -m benchmarks.train                                             # what `make bench-train` runs: 30M parameters
python -m benchmarks.train --layers 12 --heads 12 --width 768 --seq-len 1024 --batch 2
python -m benchmarks.train --processes 2 --contenders ddp fsdp zero1
python -m benchmarks.train --processes 2 --contenders zero1 zero1-muon --rounds 2
python -m benchmarks.train --peer-command 'nanoGPT=cd ~/nanoGPT && python train.py --device={device} ...'

All contenders train on the same batches from the same weights. Only a --peer-command uses its own batches and weights.
The optimizer is Muon if the name ends with -muon, otherwise AdamW. If the name ends with -blocks or -kept-blocks,
run.loss_in_blocks is true or kept. The command fails if the losses of contenders with the same optimizer do not agree.
A row of metrics covers several steps. The table has medians and quartiles over rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_command import PeerCommand, add_peer_option
from benchmarks.train_setting import Measured, Setting
from pipeline.hardware.device import GIB
from pipeline.model.gpt2 import flops_per_token, parameter_count
from pipeline.run_folder.metrics import read_metrics
from tests.support.runs import (
    BACKENDS,
    PYTHON_PATH,
    REPOSITORY,
    TRAIN,
    Sections,
    make_corpus,
    merged,
    ranks_command,
    train_arguments,
)
from tests.support.tables import print_header, print_row

MUON = "-muon"

#: The end of a contender's name -> its settings.
VARIANTS: dict[str, Sections] = {
    "": {},
    MUON: {"optimizer": {"name": "muon"}},
    "-blocks": {"run": {"loss_in_blocks": True}},
    "-kept-blocks": {"run": {"loss_in_blocks": "kept"}},
}
OURS = {f"{name}{end}": (name, end) for end in VARIANTS for name in BACKENDS}
PEERS = {
    "transformers-loop": ["loop"],
    "transformers-trainer": ["trainer"],
    "transformers-loop-eager": ["loop", "--eager"],
    "transformers-trainer-eager": ["trainer", "--eager"],
}
DEFAULT_CONTENDERS = ("ddp", "transformers-loop", "transformers-trainer")
ALL_DOCUMENTS = 1_000_000
BENCHMARKS = REPOSITORY / "benchmarks"

#: The largest differences between mean losses, in nats, that count as agreement. The first is for contenders with the
#: same batches and weights, and the second is for a command with its own batches and weights.
LOSS_TOLERANCE, LOSS_TOLERANCE_OF_COMMANDS = 0.02, 0.5


@dataclass(frozen=True)
class Limits:
    flops: float
    bytes_per_s: float
    device: str

    def __str__(self) -> str:
        products, copies = f"{self.flops / 1e12:.3f} TFLOP/s", f"{self.bytes_per_s / 1e9:.1f} GB/s"
        return f"{products} in matrix products, {copies} copied, {self.device}"


@dataclass(frozen=True)
class Contender:
    name: str
    measure: Callable[[Setting], Measured]
    loss_tolerance: float = LOSS_TOLERANCE

    @property
    def optimizer(self) -> str:
        return "muon" if self.name.endswith(MUON) else "adamw"


def train_ours(name: str, setting: Setting) -> Measured:
    """Run ``launch/train.py`` as a user does and read its ``metrics.jsonl``."""
    backend, end = OURS[name]
    sections = merged(setting.sections(), VARIANTS[end])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "run")
        run_script(setting.processes, TRAIN, train_arguments(backend, folder, sections))
        return Measured.of_rows(read_metrics(folder), setting)


def train_peer(arguments: Sequence[str], setting: Setting) -> Measured:
    """Run ``train_peers.py`` and read its rows."""
    kind, *options = arguments
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch, "rows.jsonl")
        run_script(setting.processes, BENCHMARKS / "train_peers.py", [kind, setting.to_json(), str(rows), *options])
        return Measured.of_rows([json.loads(line) for line in rows.read_text().splitlines()], setting)


def measure_limits(setting: Setting) -> Limits:
    output = run_script(setting.processes, BENCHMARKS / "machine_limits.py", [setting.to_json()])
    return Limits(**json.loads(output.strip().splitlines()[-1]))


def run_script(processes: int, script: Path, arguments: Sequence[str]) -> str:
    """Run a script and return its output. The script sets its number of threads."""
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "PYTHONWARNINGS": "ignore"}
    command = ranks_command(processes, script, arguments)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{script.name} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result.stdout


def contenders_of(names: Sequence[str], commands: Sequence[PeerCommand]) -> list[Contender]:
    """Return the contenders in the order of the command line, commands last."""
    contenders = [Contender(n, partial(train_ours, n) if n in OURS else partial(train_peer, PEERS[n])) for n in names]
    return contenders + [Contender(command.name, command.run, LOSS_TOLERANCE_OF_COMMANDS) for command in commands]


def run_rounds(contenders: Sequence[Contender], setting: Setting, rounds: int) -> dict[str, Measured]:
    """Measure each contender once per round, and combine the rows. Every second round has the reverse order."""
    found: dict[str, Measured] = {}
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            measured = contender.measure(setting)
            if earlier := found.get(contender.name):
                peaks = [peak for peak in (earlier.peak_bytes, measured.peak_bytes) if peak is not None]
                step_ms = earlier.step_ms + measured.step_ms
                measured = replace(measured, step_ms=step_ms, peak_bytes=max(peaks, default=None))
            found[contender.name] = measured
            rate = setting.tokens_per_step / statistics.median(measured.step_ms) * 1e3
            print(f"round {number + 1}: {contender.name} {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
    return found


def disagreements(contenders: Sequence[Contender], found: dict[str, Measured], warmup_steps: int) -> list[str]:
    """Return one line per contender whose losses differ from those of the first contender with the same optimizer."""
    first: dict[str, str] = {}
    lines = []
    for contender in contenders:
        name = first.setdefault(contender.optimizer, contender.name)
        if name == contender.name:
            continue
        reference, losses = found[name].losses, found[contender.name].losses
        steps = [step for step in reference if step in losses and step > warmup_steps]
        if not steps:
            lines.append(f"{contender.name} has no step in common with {name}")
            continue
        difference = abs(statistics.fmean(reference[step] - losses[step] for step in steps))
        if not difference <= contender.loss_tolerance:
            lines.append(
                f"{contender.name}: mean loss differs from {name} by {difference:.3f} nats over "
                f"{len(steps)} rows; the tolerance is {contender.loss_tolerance}"
            )
    return lines


def print_table(contenders: Sequence[Contender], found: dict[str, Measured], setting: Setting, ceiling: float) -> None:
    config = setting.config()
    flops = flops_per_token(config.model, config.seq_len)
    first_ms = statistics.median(found[contenders[0].name].step_ms)
    relative = f"relative speed of {contenders[0].name}"
    columns = ("tokens/s", "quartiles", "of the ceiling", "peak memory", "last loss", relative)
    print_header("contender", *columns)
    for contender in contenders:
        measured = found[contender.name]
        quartiles_ms = statistics.quantiles(measured.step_ms, n=4, method="inclusive")
        fastest, rate, slowest = (setting.tokens_per_step / ms * 1e3 for ms in quartiles_ms)  # tokens/s
        print_row(
            contender.name,
            f"{rate:,.0f}",
            f"{slowest:,.0f} - {fastest:,.0f}",
            f"{rate * flops / ceiling:.1%}",
            "not known" if measured.peak_bytes is None else f"{measured.peak_bytes / GIB:.2f} GiB",
            f"{measured.losses[max(measured.losses)]:.4f}",
            f"{quartiles_ms[1] / first_ms:.2f}x as fast",
        )


def compare(contenders: Sequence[Contender], setting: Setting, rounds: int) -> int:
    """Measure all contenders and print the table. Returns the number of contenders whose losses do not agree."""
    before = measure_limits(setting)
    found = run_rounds(contenders, setting, rounds)
    after = measure_limits(setting)
    model = setting.config().model
    print(
        f"{parameter_count(model) / 1e6:,.1f}M parameters ({setting.n_layer} layers, {setting.n_head} heads, "
        f"{setting.n_embd} wide), {setting.micro_batch_size} x {setting.seq_len} tokens on each of {setting.processes} "
        f"process(es), {setting.precision}, {setting.steps - setting.warmup_steps} steps after {setting.warmup_steps}, "
        f"{rounds} round(s), torch {torch.__version__}\nfirst: {before}\nlast:  {after}\n"
    )
    print_table(contenders, found, setting, max(before.flops, after.flops))
    wrong = disagreements(contenders, found, setting.warmup_steps)
    print("\n" + ("\n".join(wrong) if wrong else "The losses agree."), flush=True)
    return len(wrong)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per process and step")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--precision", default="amp_bf16", choices=["fp32", "amp_bf16", "bf16"], help="precision of this project"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps that are counted")
    parser.add_argument("--warmup-steps", type=int, default=5, help="steps before them")
    parser.add_argument("--steps-per-row", type=int, help="(default: 1 on a CPU, 5 on a GPU)")
    parser.add_argument(
        "--rounds", type=int, default=1, help="rounds of all contenders, every second one in reverse order"
    )
    parser.add_argument("--data", type=Path, help="a folder of token shards (default: the standard library's sources)")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=DEFAULT_CONTENDERS,
        choices=[*OURS, *PEERS],
        help="the others are compared with the first (default: %(default)s)",
    )
    add_peer_option(parser)
    return parser.parse_args(arguments)


def setting_of(arguments: argparse.Namespace, data: Path) -> Setting:
    return Setting(
        data=str(data.absolute()),
        n_layer=arguments.layers,
        n_head=arguments.heads,
        n_embd=arguments.width,
        seq_len=arguments.seq_len,
        micro_batch_size=arguments.batch,
        processes=arguments.processes,
        device=arguments.device,
        precision=arguments.precision,
        steps=arguments.warmup_steps + arguments.steps,
        warmup_steps=arguments.warmup_steps,
        steps_per_row=arguments.steps_per_row or (1 if arguments.device == "cpu" else 5),
    )


def main(argv: Sequence[str] | None = None) -> Any:
    """Return a non-zero status if losses do not agree."""
    arguments = parse_arguments(argv)
    contenders = contenders_of(arguments.contenders, arguments.peer_command)
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or make_corpus(Path(scratch) / "data", ALL_DOCUMENTS)
        failures = compare(contenders, setting_of(arguments, data), arguments.rounds)
    return f"the losses of {failures} contenders do not agree" if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Run another trainer with its own command, and read the steps that the trainer prints, one line per step.

The command is a template with ``{data}`` (a folder with ``train.bin`` and ``val.bin``, uint16 in nanoGPT's format),
``{n_layer}``, ``{n_head}``, ``{n_embd}``, ``{seq_len}``, ``{batch}`` (sequences per process and step),
``{tokens_per_step}``, ``{steps}``, ``{learning_rate}``, ``{processes}``, ``{device}`` and ``{out}`` (an empty folder).
A line is a step if it has a loss, and a time or a rate, in any of the forms

    iter 7: loss 9.1234, time 1717.38ms, mfu 0.40%
    step    7 | loss: 9.123400 | dt: 1717.38ms | tok/sec: 1192.49

The command uses its own weights and batches, so its losses only have to be close to those of other contenders.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.memory import watch_peak_bytes
from benchmarks.train_setting import Measured, Setting
from data_tools.formats.conversion import convert
from data_tools.formats.plan import ConvertRequest

_NUMBER = r"[:=\s]+([\d.,]+(?:e[+-]?\d+)?)"
_STEP = re.compile(rf"\b(?:iter|step){_NUMBER}", re.IGNORECASE)
_LOSS = re.compile(rf"\b(?:train[_ ])?loss{_NUMBER}", re.IGNORECASE)
_MILLISECONDS = re.compile(rf"\b(?:time|dt){_NUMBER}\s*ms\b", re.IGNORECASE)
_RATE = re.compile(rf"\btok(?:ens?)?(?:/|_per_)s(?:ec)?{_NUMBER}", re.IGNORECASE)


@dataclass(frozen=True)
class PeerCommand:
    """The name of a peer in the table, and its template."""

    name: str
    template: str

    @classmethod
    def parse(cls, text: str) -> PeerCommand:
        """Parse ``NAME=COMMAND`` of the command line."""
        name, equals, template = text.partition("=")
        if not (name and equals and template):
            raise ValueError
        return cls(name, template)

    def run(self, setting: Setting) -> Measured:
        """Train to the end and return the measured steps.

        Raises:
            RuntimeError: the command failed or printed no steps. The message contains its output.
        """
        with tempfile.TemporaryDirectory() as scratch:
            data, out, log = Path(scratch, "data"), Path(scratch, "out"), Path(scratch, "log")
            convert(ConvertRequest(source=Path(setting.data), out=data, to="nanogpt"))
            out.mkdir()
            # In the command, ``python`` and ``torchrun`` are those of this project.
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            command, environment = self.filled(setting, data, out), {**os.environ, "PATH": path}
            with log.open("w") as output:
                process = subprocess.Popen(command, shell=True, stdout=output, stderr=output, env=environment)
                peak = watch_peak_bytes(process)
            text = log.read_text(errors="replace")
        steps = list(read_steps(text.splitlines(), setting.tokens_per_step))
        if process.returncode or not steps:
            raise RuntimeError(f"{self.name} printed {len(steps)} steps, status {process.returncode}:\n{text[-3000:]}")
        counted = [milliseconds for step, _, milliseconds in steps if step > setting.warmup_steps]
        on_cpu = setting.device == "cpu"
        return Measured({step: loss for step, loss, _ in steps}, counted, peak if on_cpu else None, steps[0][2])

    def filled(self, setting: Setting, data: Path, out: Path) -> str:
        sizes = {**asdict(setting), "batch": setting.micro_batch_size, "tokens_per_step": setting.tokens_per_step}
        return self.template.format(**{**sizes, "data": data, "out": out})


def read_steps(lines: Iterable[str], tokens_per_step: int) -> Iterator[tuple[int, float, float]]:
    """Yield step, loss and milliseconds of each line that has all three values. The first such line is step 1."""
    first: int | None = None
    for line in lines:
        step, loss, milliseconds, rate = (_number(p, line) for p in (_STEP, _LOSS, _MILLISECONDS, _RATE))
        if milliseconds is None and rate:
            milliseconds = tokens_per_step / rate * 1e3
        if step is None or loss is None or milliseconds is None:
            continue
        first = int(step) if first is None else first
        yield int(step) - first + 1, loss, milliseconds


def _number(pattern: re.Pattern[str], line: str) -> float | None:
    match = pattern.search(line)
    return float(match[1].rstrip(".,").replace(",", "")) if match else None


def add_peer_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--peer-command``, which collects other trainers to compare with."""
    parser.add_argument(
        "--peer-command",
        type=PeerCommand.parse,
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="another trainer to compare with; docs/benchmarks/training.md has the protocol and an example",
    )

"""Measure the speed of one contender of :mod:`benchmarks.train`, or of matrix products and copies.

``python -m benchmarks.gpu_check.speed SETTING_JSON OUT CONTENDER [FIRST]``

FIRST is the file with the result of another contender. If the file exists, the losses of both contenders must agree.
If CONTENDER is ``ceilings``, the command measures matrix products and copies.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.train import Contender, contenders_of, disagreements, measure_limits
from benchmarks.train_command import PeerCommand
from benchmarks.train_setting import Measured, Setting
from pipeline.model.gpt2 import flops_per_token

CEILINGS = "ceilings"


def contender_of(name: str) -> Contender:
    """Return the contender with this name. For ``NAME=COMMAND``, return a contender that runs the command."""
    return contenders_of([], [PeerCommand.parse(name)])[0] if "=" in name else contenders_of([name], [])[0]


def measure(setting: Setting, name: str, first: Path | None) -> dict[str, Any]:
    """Run one contender and return its speed, its memory, and the time until its first step."""
    contender = contender_of(name)
    started = time.perf_counter()
    measured = contender.measure(setting)
    wall_s = time.perf_counter() - started
    config = setting.config()
    tokens_per_s = setting.tokens_per_step / statistics.median(measured.step_ms) * 1e3
    figures: dict[str, Any] = {
        "tokens_per_s": tokens_per_s,
        "flops": tokens_per_s * flops_per_token(config.model, config.seq_len),
        "first_step_s": None if measured.first_step_ms is None else measured.first_step_ms / 1e3,
        "wall_s": wall_s,
        "measured": asdict(measured),
    }
    if first is not None and first.exists():
        reference = json.loads(first.read_text(encoding="utf-8"))["measured"]
        reference["losses"] = {int(step): loss for step, loss in reference["losses"].items()}
        pair = [Contender(first.parent.name, contender.measure), contender]
        found = {pair[0].name: Measured(**reference), contender.name: measured}
        figures["problem"] = "; ".join(disagreements(pair, found, setting.warmup_steps))
    return figures


def main() -> None:
    setting, out, name = Setting.from_json(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    first = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    figures = asdict(measure_limits(setting)) if name == CEILINGS else measure(setting, name, first)
    out.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()

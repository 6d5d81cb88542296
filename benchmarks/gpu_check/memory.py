"""Compare planned and measured memory of a few backends: ``python -m benchmarks.gpu_check.memory SETTING_JSON OUT``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.planned_memory import LARGEST_DIFFERENCE, Setting, compare
from tests.support.runs import ranks_command


def run_script(
    processes: int, script: Path, arguments: Sequence[str], environment: dict[str, str], outputs: Path, timeout_s: float
) -> int:
    """Run a script until it ends. Return its exit status. ``RankServer.run`` is only for ranks on a CPU."""
    with (outputs / "stdout").open("w") as stdout, (outputs / "stderr").open("w") as stderr:
        command = ranks_command(processes, script, arguments)
        return subprocess.run(
            command, env=environment, stdout=stdout, stderr=stderr, timeout=timeout_s, check=False
        ).returncode


def main() -> None:
    setting = Setting(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory() as scratch:
        compared = compare(setting, run_script, Path(scratch))
    figures: dict[str, Any] = {
        "planned_bytes": compared.planned_bytes,
        "measured_bytes": compared.measured_bytes,
        "difference": compared.difference,
    }
    if not compared.agrees:
        figures["problem"] = f"plan and measurement differ by more than {LARGEST_DIFFERENCE:.0%}"
    Path(sys.argv[2]).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()

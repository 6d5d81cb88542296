"""Measure the first step of compiled backends, with one graph per block and with one graph for the whole model.

python -m benchmarks.first_step
python -m benchmarks.first_step --backends ddp --layers 48 --heads 1 --width 64

Each run starts with an empty compiler cache. CPU seconds are sums over all ranks and their compilers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from benchmarks.first_step_rank import BLOCKS, WHOLE, Measured
from benchmarks.train_setting import Setting
from tests.support.runs import REPOSITORY, child_environment, ranks_command
from tests.support.tables import print_header, print_row

RANK_SCRIPT = REPOSITORY / "benchmarks" / "first_step_rank.py"
STEPS, WARMUP_STEPS = 7, 2  # the first step compiles, and the second step may also compile


def measure(setting: Setting, backend: str, unit: str) -> Measured:
    """Run the steps. Raises RuntimeError with the output if the run fails."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "measured.json")
        command = ranks_command(setting.processes, RANK_SCRIPT, [setting.to_json(), backend, unit, str(out)])
        # Without a pool of workers, the compilers are children of the rank, which can read their CPU time.
        compiler = {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/cache", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment = {**child_environment(), **compiler}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
        return Measured(**json.loads(out.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["ddp", "fsdp", "zero1", "zero3"])
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 12])
    parser.add_argument("--units", nargs="+", choices=[BLOCKS, WHOLE], default=[BLOCKS, WHOLE])
    for name, default in (("heads", 4), ("width", 256), ("seq-len", 128), ("batch", 2), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", default="amp_bf16")
    chosen = parser.parse_args()
    columns = ("backend", "layers", "compiled", "graphs", "breaks", "first step", "its CPU time")
    print_header(*columns, "CPU time of a step")
    for backend in chosen.backends:
        for n_layer in chosen.layers:
            sizes = (n_layer, chosen.heads, chosen.width, chosen.seq_len, chosen.batch, chosen.processes)
            setting = Setting("random tokens", *sizes, chosen.device, chosen.precision, STEPS, WARMUP_STEPS, 1)
            for unit in chosen.units:
                found = measure(setting, backend, unit)
                times = (f"{found.first_s:.1f} s", f"{found.first_cpu_s:.1f} s", f"{found.later_cpu_s:.2f} s")
                print_row(backend, n_layer, unit, found.graphs, found.breaks, *times)


if __name__ == "__main__":
    main()

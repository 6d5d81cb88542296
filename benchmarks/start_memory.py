"""Measure the peak memory of each rank at the start of a run: until its weights have their initial values.

python -m benchmarks.start_memory                       # what `make start-memory` runs
python -m benchmarks.start_memory --models gpt2-medium --backends fsdp --ranks 2

The peak does not include the memory of libraries and the optimizer's state. On a CPU, the machine needs the sum of the
peaks of all ranks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.planned_memory import MIB, RANK_SCRIPT, rank_environment, start_ranks
from pipeline.config.loading import load_config
from pipeline.model.gpt2 import parameter_count
from tests.support.rank_server import RankServer
from tests.support.runs import CONFIGS
from tests.support.tables import print_header, print_row

#: Backend -> precision. ZeRO has bf16: with ZeRO-3, the fp32 weights of the largest model do not fit into 24 GB.
PRECISIONS = {"ddp": "fp32", "fsdp": "fp32", "zero1": "bf16", "zero2": "bf16", "zero3": "bf16"}
SEQ_LEN = 64


def measure(backend: str, model: str, ranks: int, server: RankServer) -> tuple[int, int]:
    """Start a run. Returns two sizes in bytes: the largest peak of a rank, and all weights in fp32."""
    settings = [
        f"model.preset={model}",
        f"run.precision={PRECISIONS[backend]}",
        "run.device=cpu",
        f"data.seq_len={SEQ_LEN}",
        "batch.micro_batch_size=1",
        f"batch.tokens_per_step={SEQ_LEN * ranks}",
    ]
    files = [str(CONFIGS / f"{backend}.json")]
    config = load_config(files, settings)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        arguments = [str(out / "peak.json"), "--steps", "0", "--config", *files, "--set", *settings]
        if server.run(ranks, RANK_SCRIPT, arguments, rank_environment(), out, 1800):
            raise RuntimeError(f"{backend}, {model}:\n{(out / 'stderr').read_text()[-3000:]}")
        peak: int = json.loads((out / "peak.json").read_text())["peak_bytes"]
    return peak, 4 * parameter_count(config.model, padded=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2-medium", "gpt2-large", "gpt2-xl"], help="presets")
    parser.add_argument("--backends", nargs="+", default=["fsdp", "zero3"], choices=PRECISIONS)
    parser.add_argument("--ranks", type=int, default=4)
    chosen = parser.parse_args()
    print_header("model", "backend", "precision", "ranks", "all weights in fp32", "peak of a rank")
    server = start_ranks()
    for model in chosen.models:
        for backend in chosen.backends:
            peak, whole = measure(backend, model, chosen.ranks, server)
            sizes = (f"{whole / MIB:,.0f} MiB", f"{peak / MIB:,.0f} MiB")
            print_row(model, backend, PRECISIONS[backend], chosen.ranks, *sizes)


if __name__ == "__main__":
    main()

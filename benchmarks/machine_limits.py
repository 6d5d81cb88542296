"""Measure FLOP/s of matrix products and bytes/s of copies, with all processes at the same time.

:mod:`benchmarks.train` runs this script in the same way as the contenders. It prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks.train_setting import Setting
from pipeline.distributed.cpu import share_cores
from pipeline.distributed.world import join_world
from pipeline.hardware.device import synchronize
from pipeline.hardware.matmul_ceiling import CEILING_SECONDS
from pipeline.training.throughput import measure_ceiling

_COPIED_BYTES = 1 << 28
_ROUNDS = 5


def measure_copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second read and written by copies within the device's memory, the best of five."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    fastest_s = float("inf")
    for _ in range(_ROUNDS + 1):  # the first run allocates the target's pages
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        fastest_s = min(fastest_s, time.perf_counter() - start)
    return 2 * _COPIED_BYTES / fastest_s


def main() -> None:
    setting = Setting.from_json(sys.argv[1])
    config = setting.config()
    with join_world(config.run) as world:
        if world.device.type == "cpu":
            share_cores(world)
        products = max(measure_ceiling(world, config, CEILING_SECONDS) for _ in range(_ROUNDS))
        copies = sum(world.gather(measure_copy_bandwidth(world.device)))
        if world.is_main:
            name = torch.cuda.get_device_name() if world.device.type == "cuda" else f"{torch.get_num_threads()} threads"
            print(json.dumps({"flops": products, "bytes_per_s": copies, "device": name}), flush=True)


if __name__ == "__main__":
    main()

"""Describe the machine and the installed packages as JSON: ``python -m benchmarks.gpu_check.machine cpu|cuda OUT``."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from pipeline.hardware.device import GIB

OPTIONAL_PACKAGES = ("deepspeed", "transformers", "accelerate", "pytest", "triton")


def describe(device_type: str) -> dict[str, Any]:
    """Return what the check needs to know about the machine.

    Raises:
        SystemExit: ``device_type`` is ``cuda``, but there is no GPU.
    """
    found: dict[str, Any] = {
        "device_type": device_type,
        "device": platform.machine(),
        "devices": 0,
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in OPTIONAL_PACKAGES},
    }
    if device_type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"torch {torch.__version__} sees no GPU; use --device cpu, or install torch for CUDA")
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "devices": torch.cuda.device_count(),
            "memory_gib": properties.total_memory / GIB,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nccl": ".".join(map(str, nccl.version())),  # type: ignore[no-untyped-call]
        }
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(describe(sys.argv[1])), encoding="utf-8")

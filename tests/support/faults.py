"""Define the faults of a rank by name, such as running out of memory."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch


def run_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def sleep_for_ever(*_: Any, **__: Any) -> None:
    print("stuck now", flush=True)
    while True:
        time.sleep(3600)


def loop_for_ever() -> None:
    print("stuck now", flush=True)
    while True:
        pass


def send_self(number: signal.Signals) -> None:
    print(f"pid {os.getpid()} sends itself {number.name}", flush=True)
    os.kill(os.getpid(), number)


FAULTS: dict[str, Callable[[], None]] = {
    "raises": run_out_of_memory,
    "sleeps": sleep_for_ever,
    "loops": loop_for_ever,
    "is killed": lambda: send_self(signal.SIGKILL),
    "is suspended": lambda: send_self(signal.SIGSTOP),
    **{f"gets {number.name}": functools.partial(send_self, number) for number in signal.Signals},
}

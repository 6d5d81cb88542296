"""The only file that reads environment variables: the launchers (torchrun, deepspeed) speak through them."""

from __future__ import annotations

import os

_RANK, _WORLD_SIZE, _LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
_RESTARTS, _LAUNCH = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"
_THREADS = "OMP_NUM_THREADS"


def launched_rank() -> int:
    """This process among all of the run; 0 under plain python."""
    return int(os.environ.get(_RANK, "0"))


def launched_world_size() -> int:
    """Processes of the run; 1 under plain python."""
    return int(os.environ.get(_WORLD_SIZE, "1"))


def launched_local_rank() -> int:
    """This process among those of its node; 0 under plain python."""
    return int(os.environ.get(_LOCAL_RANK, "0"))


def launcher_restarts() -> int:
    """How often the launcher has started this run's processes anew after a failure; 0: this is the first time."""
    return int(os.environ.get(_RESTARTS, "0"))


def launch_id() -> str | None:
    """What the starts by one launcher have in common, restarts included; None: no launcher that restarts."""
    return os.environ.get(_LAUNCH)


def requested_threads() -> int | None:
    """How many threads the user wants a process to have; None: has not said.

    To several processes torchrun gives 1 where nothing is set: that is nobody's wish.
    """
    text = os.environ.get(_THREADS, "")
    of_torchrun = text == "1" and launch_id() is not None and launched_world_size() > 1
    return int(text) if text.isdecimal() and int(text) > 0 and not of_torchrun else None


def present_as_launched(device_type: str) -> None:
    """Give DeepSpeed the variables that it insists on where no launcher has set them."""
    for name, value in ((_RANK, "0"), (_WORLD_SIZE, "1"), (_LOCAL_RANK, "0"), ("DS_ACCELERATOR", device_type)):
        os.environ.setdefault(name, value)

"""Read the environment variables that launchers (torchrun, deepspeed) set. No other file reads them."""

import os

_RANK, _WORLD_SIZE, _LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"


def launched_rank() -> int:
    """Return this process's rank, or 0 without a launcher."""
    return int(os.environ.get(_RANK, "0"))


def launched_world_size() -> int:
    """Return the number of processes of the run, or 1 without a launcher."""
    return int(os.environ.get(_WORLD_SIZE, "1"))


def launched_local_rank() -> int:
    """Return this process's rank on its node, or 0 without a launcher."""
    return int(os.environ.get(_LOCAL_RANK, "0"))


def launcher_restarts() -> int:
    """Return the number of times that the launcher has restarted the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str | None:
    """Return an id that is the same in all restarts by one launcher. Returns None if no launcher restarts processes."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def launcher_name() -> str | None:
    """Return ``torchrun`` or ``deepspeed``, or None if neither of these launchers started this process."""
    if launch_id() is not None:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in os.environ and "LOCAL_SIZE" in os.environ else None


def requested_threads() -> int | None:
    """Return the number of threads per process that the user has set, or None.

    torchrun sets ``OMP_NUM_THREADS=1`` by default if it starts several processes, so this value is ignored.
    """
    text = os.environ.get("OMP_NUM_THREADS", "")
    is_torchrun_default = text == "1" and launch_id() is not None and launched_world_size() > 1
    return int(text) if text.isdecimal() and int(text) > 0 and not is_torchrun_default else None


def set_launcher_variables(device_type: str) -> None:
    """Set the variables that DeepSpeed requires, unless a launcher has set them."""
    for name, value in ((_RANK, "0"), (_WORLD_SIZE, "1"), (_LOCAL_RANK, "0"), ("DS_ACCELERATOR", device_type)):
        os.environ.setdefault(name, value)

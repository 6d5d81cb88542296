"""The only file that reads environment variables, which the launchers (torchrun, deepspeed) set."""

import os

_RANK, _WORLD_SIZE, _LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"


def launched_rank() -> int:
    """Return this process's rank; 0 under plain python."""
    return int(os.environ.get(_RANK, "0"))


def launched_world_size() -> int:
    """Return the number of processes of the run; 1 under plain python."""
    return int(os.environ.get(_WORLD_SIZE, "1"))


def launched_local_rank() -> int:
    """Return this process's rank on its node; 0 under plain python."""
    return int(os.environ.get(_LOCAL_RANK, "0"))


def launcher_restarts() -> int:
    """Return how often the launcher has restarted the processes after a failure; 0 on the first start."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str | None:
    """Return the id that all restarts by one launcher share. Returns None without a launcher that restarts."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def requested_threads() -> int | None:
    """Return the number of threads per process that the user asks for, or None.

    torchrun sets ``OMP_NUM_THREADS=1`` by default if it starts several processes, so that value is ignored.
    """
    text = os.environ.get("OMP_NUM_THREADS", "")
    is_torchrun_default = text == "1" and launch_id() is not None and launched_world_size() > 1
    return int(text) if text.isdecimal() and int(text) > 0 and not is_torchrun_default else None


def set_launcher_variables(device_type: str) -> None:
    """Set the variables that DeepSpeed requires where no launcher has set them."""
    for name, value in ((_RANK, "0"), (_WORLD_SIZE, "1"), (_LOCAL_RANK, "0"), ("DS_ACCELERATOR", device_type)):
        os.environ.setdefault(name, value)

"""Read and set environment variables, such as those of torchrun and deepspeed.

Only this file uses environment variables.
"""

import os
from pathlib import Path

from data_tools.errors import PROJECT
from pipeline.errors import ConfigError

_RANK, _WORLD_SIZE, _LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
_MASTER_ADDR, _MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_GLOO_CONNECTS_LATE = "TORCH_GLOO_LAZY_INIT"
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch still reads the older, second name
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_OPENBLAS_THREADS = "OPENBLAS_NUM_THREADS"
_OPENMP_WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_LAUNCHER_VARIABLES = (_RANK, _WORLD_SIZE, _LOCAL_RANK, "LOCAL_WORLD_SIZE", _MASTER_ADDR, _MASTER_PORT)
#: Variables with the number of processes that a program has started without connecting them.
_UNCONNECTED = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}

#: How often a waiting OpenMP thread spins before it sleeps. See docs/performance.md.
DEFAULT_SPINS = 10_000


def launched_rank() -> int:
    """Return the rank of this process, or 0 without a launcher."""
    return _number(_RANK, 0) if launched_world_size() > 1 else 0


def launched_world_size() -> int:
    """Return the number of processes of the run, or 1 without a launcher."""
    return _number(_WORLD_SIZE, 1)


def launched_local_rank() -> int:
    """Return the rank of this process on its node, or 0 without a launcher."""
    return _number(_LOCAL_RANK, 0)


def _number(name: str, default: int) -> int:
    """Return the value of a variable, or the default if the value is not a number."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def master_address() -> tuple[str, int]:
    """Return the host and the port of the key-value store that the ranks share."""
    return os.environ[_MASTER_ADDR], int(os.environ[_MASTER_PORT])


def launcher_holds_store() -> bool:
    """Return whether the launcher serves the key-value store of the ranks. If not, rank 0 must serve this store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launcher_variables() -> dict[str, str]:
    """Return the launcher's environment variables in this process, with their values."""
    return {name: os.environ[name] for name in _LAUNCHER_VARIABLES if name in os.environ}


def is_activated_environment(environment: str) -> bool:
    """Return whether the shell has activated the virtual environment in this folder."""
    return os.environ.get("VIRTUAL_ENV") == environment


def unset_command() -> str:
    """Return a shell command that unsets the launcher's environment variables."""
    return f"unset {' '.join(launcher_variables())}"


def check_launcher() -> None:
    """Raise ConfigError if a launcher's variables contradict each other, or if srun or mpirun takes its place."""
    for program, variable in _UNCONNECTED.items():
        if _WORLD_SIZE not in os.environ and (processes := _number(variable, 1)) > 1:
            raise ConfigError(
                f"{program} has started {processes} processes ({variable}), but does not connect them: let {program} "
                f"start one torchrun per node; for separate runs in separate folders: export {_WORLD_SIZE}=1"
            )
    if problem := _find_contradiction(launcher_variables()):
        raise ConfigError(
            f"{problem}; if the variable is left over from another launcher: {unset_command()}; "
            "otherwise start the ranks with torchrun or deepspeed"
        )


def _find_contradiction(variables: dict[str, str]) -> str | None:
    for name in (_RANK, _WORLD_SIZE, _LOCAL_RANK, _MASTER_PORT):
        if name in variables and not variables[name].isdecimal():
            return f"the environment variable {name} is {variables[name]!r}, not a whole number"
    size, rank = int(variables.get(_WORLD_SIZE, "1")), int(variables.get(_RANK, "0"))
    if size < 1:
        return f"the environment variable {_WORLD_SIZE} is {size}"
    if rank >= size:
        total = f"{_WORLD_SIZE} is {size}" if _WORLD_SIZE in variables else f"{_WORLD_SIZE} is not set"
        return f"the environment variable {_RANK} is {rank}, but {total}"
    missing = [name for name in (_RANK, _MASTER_ADDR, _MASTER_PORT) if name not in variables]
    if size > 1 and missing:
        names = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        return f"the environment variable {_WORLD_SIZE} is {size}, but {names} not set"
    return None


def launcher_restarts() -> int:
    """Return how many times the launcher has restarted the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str | None:
    """Return an id of this launch, which stays the same after a restart. Without torchrun, return None.

    Different launches may have the same ``--rdzv-id``. So the id also contains the name of torchrun's folder for logs,
    which is new in each launch and on each host.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    log_folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent.parent  # FOLDER/attempt_0/0/FILE
    return None if run_id is None else f"{run_id}/{log_folder.name}"


def launcher_name() -> str | None:
    """Return which launcher started this process: ``torchrun``, ``deepspeed``, or None."""
    if launch_id() is not None:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in os.environ and "LOCAL_SIZE" in os.environ else None


def requested_threads() -> int | None:
    """Return the number of threads per process that the user has set with ``OMP_NUM_THREADS``, or None.

    Also return None if torchrun has set the variable to 1, which is torchrun's default for several processes.
    """
    text = os.environ.get("OMP_NUM_THREADS", "")
    is_torchrun_default = text == "1" and launch_id() is not None and launched_world_size() > 1
    return int(text) if text.isdecimal() and int(text) > 0 and not is_torchrun_default else None


def visible_gpus() -> str | None:
    """Return the numbers of the GPUs that this process can use (``CUDA_VISIBLE_DEVICES``), or None for all GPUs."""
    return os.environ.get(_VISIBLE_GPUS)


def wants_colours() -> bool:
    """Return whether the user allows colours on a terminal (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def cache_folder() -> Path:
    """Return this user's folder for files that can be downloaded again. The folder need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", PROJECT)


def gloo_interface() -> str | None:
    """Return the network interface that is set for Gloo, or None."""
    return os.environ.get(_GLOO_INTERFACE)


def set_gloo_interface(name: str) -> bool:
    """Set the network interface for Gloo, and return True. If the user has already set one, return False."""
    if gloo_interface() is not None:
        return False
    os.environ[_GLOO_INTERFACE] = name
    return True


def let_gloo_connect_late() -> None:
    """Make Gloo connect two ranks only when they first exchange data.

    If the user has set ``TORCH_GLOO_LAZY_INIT``, do nothing.
    """
    os.environ.setdefault(_GLOO_CONNECTS_LATE, "1")


def set_openmp_threads(threads: int) -> None:
    """Set the number of threads for libraries with their own copy of OpenMP, such as DeepSpeed's CPUAdam.

    Call this function before such a library is loaded. ``torch.set_num_threads`` has no effect on such libraries.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)


def set_openmp_default() -> None:
    """Make waiting OpenMP threads spin ``DEFAULT_SPINS`` times before they sleep, unless the user has configured this.

    Call this function before torch is imported, because OpenMP reads its environment variables when it is loaded.

    Torch on Linux uses GNU's OpenMP, which would spin 300,000 times. If other processes use the same cores,
    the spinning takes time from the other threads of this process.
    """
    if not any(name in os.environ for name in _OPENMP_WAIT_VARIABLES):
        os.environ[_OPENMP_WAIT_VARIABLES[0]] = str(DEFAULT_SPINS)


def set_numpy_threads_default() -> None:
    """Make numpy start no threads for matrix products, unless the user has configured this.

    Call this function before numpy is imported. Use it in commands that multiply no matrices: the start of the threads
    takes as much time as the import of numpy.
    """
    os.environ.setdefault(_OPENBLAS_THREADS, "1")


def set_allocator_default() -> None:
    """Make torch allocate GPU memory in segments that can grow, unless the user has set allocator options.

    Call this function before the first allocation on a GPU. In segments that cannot grow, freed blocks are often too
    small for the next tensor.

    Under WSL 2, this function does nothing, because some drivers cannot allocate such segments there
    (https://github.com/pytorch/pytorch/issues/192330).
    """
    is_wsl = "microsoft" in os.uname().release.lower()
    if not is_wsl and not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def set_mlflow_defaults() -> None:
    """Make MLflow's client give up failed requests soon, because the run itself sends the data again later.

    By default, the client repeats a failed request for several minutes. Variables that the user has set do not change.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds


def set_launcher_variables(device_type: str) -> None:
    """Set the environment variables that DeepSpeed requires, unless a launcher has already set them."""
    for name, value in ((_RANK, "0"), (_WORLD_SIZE, "1"), (_LOCAL_RANK, "0"), ("DS_ACCELERATOR", device_type)):
        os.environ.setdefault(name, value)

"""The environment variables of launchers and users are read as they are meant."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.distributed.environment import (
    DEFAULT_SPINS,
    check_launcher,
    launched_rank,
    launched_world_size,
    requested_threads,
    set_numpy_threads_default,
    set_openmp_default,
)
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "4"}, 4),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}, 1),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, 3),
    ],
)
def test_torchruns_default_of_one_thread_is_ignored(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int | None
) -> None:
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert requested_threads() == threads


@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_waiting_threads_sleep_early_unless_the_user_decides(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]
) -> None:
    variables = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for name in variables:
        monkeypatch.setenv(name, chosen.get(name, ""))  # so that pytest restores it
        if name not in chosen:
            monkeypatch.delenv(name)
    set_openmp_default()
    found = {name: os.environ[name] for name in variables if name in os.environ}
    assert found == (chosen or {"GOMP_SPINCOUNT": str(DEFAULT_SPINS)})


@pytest.mark.parametrize(("chosen", "expected"), [(None, "1"), ("3", "3")])
def test_numpy_starts_no_threads_unless_the_user_decides(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: str
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", chosen or "")  # so that pytest restores it
    if chosen is None:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    set_numpy_threads_default()
    assert os.environ["OPENBLAS_NUM_THREADS"] == expected


def test_commands_set_the_default_before_they_load_openmp() -> None:
    code = "import sys, os, launch; sys.exit('torch' in sys.modules or 'GOMP_SPINCOUNT' not in os.environ)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_"))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_plain_python_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_rank(), launched_world_size()) == (0, 1)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE is 'eight', not a whole number"),
        ({"WORLD_SIZE": "0"}, "RANK is 0, but WORLD_SIZE is 0|WORLD_SIZE is 0"),
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ],
)
def test_variables_that_contradict_each_other_are_named_with_a_cure(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], problem: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    check_launcher()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launched_rank()  # raises no error, because the log needs the rank before the variables are checked
    with pytest.raises(ConfigError, match=f"({problem}).*: unset "):
        check_launcher()


@pytest.mark.parametrize(
    ("variable", "program"),
    [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpiexec")],
)
def test_processes_that_nothing_connects_are_refused_unless_they_are_separate_runs(
    monkeypatch: pytest.MonkeyPatch, variable: str, program: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, "1")
    check_launcher()
    monkeypatch.setenv(variable, "8")
    with pytest.raises(ConfigError, match=f"{program} has started 8 processes .* export WORLD_SIZE=1"):
        check_launcher()
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_launcher()

"""The environment variables of launchers and users are read as they are meant."""

from __future__ import annotations

import pytest

from pipeline.distributed.environment import check_launcher, launched_rank, launched_world_size, requested_threads
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


def test_plain_python_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_rank(), launched_world_size()) == (0, 1)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK and MASTER_ADDR and MASTER_PORT are not set"),
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
    assert launched_rank() >= 0
    with pytest.raises(ConfigError, match=f"({problem}).*: unset "):
        check_launcher()

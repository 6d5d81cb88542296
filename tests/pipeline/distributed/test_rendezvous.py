"""All ranks of a start agree on its id, whatever an earlier start has left in the launcher's store."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from queue import Queue

import pytest
from torch._C._distributed_c10d import HashStore, Store

from pipeline.distributed import rendezvous
from pipeline.distributed.rendezvous import connecting, open_store
from pipeline.errors import ConfigError, LostRankError


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Store:
    """The launcher's store, which outlives its ranks."""
    store = HashStore()
    monkeypatch.setattr(rendezvous, "connect", lambda rank, size, timeout: store)
    return store


def start(ranks: int, timeout_s: float = 20.0) -> list[Store]:
    """Return the store of each rank of a start."""
    with ThreadPoolExecutor(ranks) as threads:
        opened = [threads.submit(open_store, rank, ranks, timedelta(seconds=timeout_s)) for rank in range(ranks)]
        return [future.result() for future in opened]


def test_one_rank_needs_no_launcher() -> None:
    open_store(0, 1, timedelta(seconds=1)).set("key", "value")


def test_the_ranks_of_a_start_share_keys_that_no_other_start_sees(shared: Store) -> None:
    first = start(3)
    first[0].set("address", "of the first start")
    assert all(store.get("address") == b"of the first start" for store in first)
    for ranks in (3, 2):
        again = start(ranks)
        assert not any(store.check(["address"]) for store in again)
        again[1].set("address", "of this start")
        assert all(store.get("address") == b"of this start" for store in again)


def test_a_missing_rank_is_named(shared: Store) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="waiting for ranks 1, 2$"):
        open_store(0, 3, timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match="waiting for rank 0"):
        open_store(1, 3, timedelta(seconds=0.1))
    assert time.monotonic() - started < 10


def test_waiting_ranks_name_the_rank_that_is_missing(shared: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_LOOK_S", 0.1)
    with ThreadPoolExecutor(3) as threads:
        opened = [threads.submit(open_store, rank, 4, timedelta(seconds=2)) for rank in (0, 1, 3)]
        for waiting in opened:
            with pytest.raises(TimeoutError, match="waiting for rank 2$"):
                waiting.result()
    with pytest.raises(TimeoutError, match="waiting for rank 0$"):  # what an earlier start has left is not believed
        open_store(1, 4, timedelta(seconds=1))


def test_missing_ranks_are_announced(
    shared: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "_ANNOUNCE_AFTER_S", 0.1)
    with pytest.raises(TimeoutError):
        open_store(0, 3, timedelta(seconds=1))
    line = capfd.readouterr().err
    assert "still waits at node0:29500 (MASTER_ADDR, MASTER_PORT) for ranks 1, 2 of 3 (WORLD_SIZE)" in line
    assert "unset RANK WORLD_SIZE" in line

    def connect_late(*_: object) -> Store:
        time.sleep(1)
        return shared

    monkeypatch.setattr(rendezvous, "connect", connect_late)
    with pytest.raises(TimeoutError):
        open_store(1, 3, timedelta(seconds=0.1))
    assert "rank 1 on" in (line := capfd.readouterr().err) and "cannot connect to node0:29500" in line


def test_blocked_connections_between_ranks_are_announced_and_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in {"_CONNECTING_IS_SLOW_S": 0.1, "PATIENCE_S": 0.2}.items():
        monkeypatch.setattr(rendezvous, name, seconds)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    statuses: Queue[int] = Queue()
    monkeypatch.setattr(os, "_exit", statuses.put)
    with connecting(1):
        assert statuses.get(timeout=60) == LostRankError.exit_status
    announced, ended = capfd.readouterr().err.splitlines()
    assert "still connects to the other ranks through eth7; " in announced and "firewalls" in announced
    assert ended == f"error: gave up after 0 s: {announced}"


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other_run:
        other_run.bind(("", 0))
        other_run.listen()
        port = other_run.getsockname()[1]
        for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ConfigError, match=rf"port {port} of localhost \(MASTER_PORT\) is in use .*--master_port \d+"
        ):
            open_store(0, 2, timedelta(seconds=5))

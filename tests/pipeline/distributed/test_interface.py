"""On several nodes, gloo uses the interface that leads to the other nodes, whatever the hosts' own names mean."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from pipeline.distributed import interface
from pipeline.distributed.interface import choose_gloo_interface, interface_of, own_address_towards

REPOSITORY = Path(__file__).resolve().parents[3]

#: For each rank: the address of its host towards MASTER_ADDR and towards other hosts, and the interface to choose.
ONE_NODE = [("127.0.0.1", "", None)] * 3
ONE_NODE_BY_ITS_ADDRESS = [("10.0.0.1", "10.0.0.1", None)] * 3
DEBIAN = [("127.0.0.1", "10.0.0.1", "eth1"), ("127.0.0.1", "10.0.0.1", "eth1"), ("10.0.0.2", "10.0.0.2", "eth2")]
PLAIN = [("10.0.0.1", "10.0.0.1", "eth1"), ("10.0.0.2", "10.0.0.2", "eth2")]
INTERFACES = {"127.0.0.1": "lo", "10.0.0.1": "eth1", "10.0.0.2": "eth2"}


@pytest.mark.parametrize("ranks", [ONE_NODE, ONE_NODE_BY_ITS_ADDRESS, DEBIAN, PLAIN])
def test_the_interface_leads_to_the_other_nodes(
    monkeypatch: pytest.MonkeyPatch, ranks: Sequence[tuple[str, str, str | None]]
) -> None:
    here = threading.local()
    chosen: list[str | None] = [None] * len(ranks)

    def towards(host: str, port: int) -> str:
        return ranks[here.rank][0 if host == "node0" else 1]

    def set_interface(name: str) -> bool:
        chosen[here.rank] = name
        return True

    def choose(rank: int) -> None:
        here.rank = rank
        choose_gloo_interface(store, rank, len(ranks))

    monkeypatch.setattr(interface, "master_address", lambda: ("node0", 29500))
    monkeypatch.setattr(interface, "own_address_towards", towards)
    monkeypatch.setattr(interface, "interface_of", INTERFACES.get)
    monkeypatch.setattr(interface, "set_gloo_interface", set_interface)
    store = HashStore()
    with ThreadPoolExecutor(len(ranks)) as threads:
        list(threads.map(choose, range(len(ranks))))
    assert chosen == [name for _, _, name in ranks]


def test_addresses_and_interfaces_of_this_machine() -> None:
    assert own_address_towards("127.0.0.1", 1) == "127.0.0.1"
    assert interface_of("127.0.0.1") in ("lo", "lo0")
    assert interface_of("203.0.113.7") is None
    assert own_address_towards("no-such-host.invalid", 1) == ""


PROGRAM = """
import os, torch
from pipeline.config.schema import RunConfig
from pipeline.distributed.world import join_world

with join_world(RunConfig(device="cpu")) as world:
    total = world.with_cpu_group().sum(world.sum(torch.ones(()))).item()
    print(f"rank {world.rank} sums {total} over {os.environ.get('GLOO_SOCKET_IFNAME')}", flush=True)
"""


def _can_make_networks() -> bool:
    has_commands = shutil.which("ip") is not None and shutil.which("unshare") is not None
    return has_commands and subprocess.run(["unshare", "-n", "-m", "-u", "true"], capture_output=True).returncode == 0


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[[str, str], list[str]]]:
    """Make two hosts in namespaces of the kernel, joined by a cable, whose names are 127.0.1.1 as on Debian.

    Yields a function that returns the command that runs Python code on a host.
    """
    names = {node: f"gpt2-{os.getpid()}-{node}" for node in "ab"}
    cables = {node: f"v{os.getpid()}{node}" for node in "ab"}

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    def on(node: str, code: str) -> list[str]:
        hosts = tmp_path / f"hosts_{node}"
        other = "b" if node == "a" else "a"
        own_number = {"a": 1, "b": 2}
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 node-{node}\n10.99.0.{own_number[other]} node-{other}\n")
        enter = ["ip", "netns", "exec", names[node], "unshare", "-u", "-m", "sh", "-c"]
        setup = f'hostname node-{node} && mount --bind {hosts} /etc/hosts && exec "$0" -c "$1"'
        return [*enter, setup, sys.executable, code]

    with ExitStack() as cleanup:
        for node in "ab":
            ip("netns", "add", names[node])
            cleanup.callback(ip, "netns", "del", names[node])  # also deletes the cable
        ip("link", "add", cables["a"], "type", "veth", "peer", "name", cables["b"])
        for number, node in enumerate("ab", start=1):
            ip("link", "set", cables[node], "netns", names[node])
            ip("-n", names[node], "addr", "add", f"10.99.0.{number}/24", "dev", cables[node])
            for device in ("lo", cables[node]):
                ip("-n", names[node], "link", "set", device, "up")
        yield on


@pytest.mark.skipif(not _can_make_networks(), reason="needs root, and the commands ip and unshare")
def test_two_nodes_whose_names_are_loopback_addresses(nodes: Callable[[str, str], list[str]]) -> None:
    launched = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    inherited = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    processes = [
        subprocess.Popen(
            nodes(node, PROGRAM),
            cwd=REPOSITORY,
            env={**inherited, **launched, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, node in enumerate("ab")
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for rank, node in enumerate("ab"):
        assert f"rank {rank} sums 4.0 over v{os.getpid()}{node}" in outputs[rank], outputs[rank]
    assert socket.gethostname() not in ("node-a", "node-b")

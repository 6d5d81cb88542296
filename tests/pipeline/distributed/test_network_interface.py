"""On several nodes, gloo uses the interface that leads to the other nodes, whatever the hosts' own names mean."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from pipeline.distributed import network_interface
from pipeline.distributed.network_interface import choose_gloo_interface, interface_of, own_address_towards
from tests.support.hosts import Lab, NamespacesError
from tests.support.runs import child_environment

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

    monkeypatch.setattr(network_interface, "master_address", lambda: ("node0", 29500))
    monkeypatch.setattr(network_interface, "own_address_towards", towards)
    monkeypatch.setattr(network_interface, "interface_of", INTERFACES.get)
    monkeypatch.setattr(network_interface, "set_gloo_interface", set_interface)
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
import os, socket, torch
from pipeline.config.schema import RunConfig
from pipeline.distributed.links import describe_links, measure_links
from pipeline.distributed.world import join_world

with join_world(RunConfig(device="cpu")) as world:
    total = world.with_cpu_group().sum(world.sum(torch.ones(()))).item()
    hosts = world.gather(socket.gethostname())
    links = describe_links(measure_links(world, hosts, 1 << 20), hosts)
    print(f"{hosts[world.rank]} sums {total} over {os.environ.get('GLOO_SOCKET_IFNAME')}; {links}", flush=True)
"""
MEGABITS = 20


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    try:
        hosts = Lab(3, tmp_path / "hosts", names_are_loopback=True)
    except NamespacesError as error:
        pytest.skip(str(error))
    with hosts:
        yield hosts


def test_hosts_whose_names_are_loopback_addresses(lab: Lab) -> None:
    """Also measure the links between the hosts. One of them is slow."""
    lab.hosts[1].limit(MEGABITS)
    inherited = {name: value for name, value in child_environment().items() if name != "GLOO_SOCKET_IFNAME"}
    launched = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    processes = [
        subprocess.Popen(
            host.command([sys.executable, "-c", PROGRAM]),
            env={**inherited, **launched, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, host in enumerate(lab.hosts)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for host, output in zip(lab.hosts, outputs, strict=True):
        assert f"{host.name} sums 9.0 over eth0; slow link: node1 (rank 1) sends and receives" in output, output
        rates = re.findall(r"([\d.]+)(?= to|$| MB/s)", output.split("sends and receives")[1].split(",")[0])
        assert len(rates) == 2 and all(float(rate) < 1.1 * MEGABITS / 8 for rate in rates), output
    assert socket.gethostname() not in outputs[0]

"""Measure the ``TCPStore`` that all ranks share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import psutil
from torch._C._distributed_c10d import TCPStore

from pipeline.distributed.rendezvous import free_port
from tests.support.runs import REPOSITORY, child_environment

MIB = 1 << 20
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Load:
    memory_bytes: int
    connections: int
    cpu_s: float

    @classmethod
    def of(cls, process: psutil.Process) -> Load:
        times = process.cpu_times()
        return cls(process.memory_info().rss, process.num_fds(), times.user + times.system)


class Ranks:
    """Processes with simulated ranks. They begin each phase together."""

    def __init__(self, ranks: int, processes: int, seconds: float, timeout_s: float, store_port: int) -> None:
        self._count = processes
        port = free_port()
        self._conductor = TCPStore("localhost", port, None, True, TIMEOUT, wait_for_workers=False)
        bounds = [ranks * index // processes for index in range(processes + 1)]
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store_port), "WORLD_SIZE": str(ranks)}
        self.processes = []
        for index in range(processes):
            arguments = (index, ranks, bounds[index], bounds[index + 1], port, seconds, timeout_s)
            variables = {**launched, "RANK": str(bounds[index]), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            command = [sys.executable, "-m", "benchmarks.control_plane.ranks", *map(str, arguments)]
            environment = {**child_environment(), **variables}
            self.processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment))

    def run(self, phase: str) -> list[dict[str, float]]:
        self._conductor.set(f"begin_{phase}", "")
        return self.collect(phase)

    def collect(self, phase: str) -> list[dict[str, float]]:
        """Wait until all processes have reached the end of a phase, and return what they measured."""
        return [json.loads(self._conductor.get(f"{phase}_{index}")) for index in range(self._count)]


def measure_store(ranks: int, processes: int, seconds: float, timeout_s: float) -> Iterator[tuple[str, str]]:
    """Yield (name, value with its unit) for each measurement.

    Args:
        seconds: the time in which heartbeats are counted.
        timeout_s: the time without a heartbeat after which a rank counts as lost.
    """
    port = free_port()
    with ExitStack() as resources:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        resources.callback(server.kill)
        group = Ranks(ranks, processes, seconds, timeout_s, port)
        for each in group.processes:
            resources.callback(each.kill)
        group.collect("ready")
        assert server.stdout and server.stdout.readline() == "ready\n"
        process = psutil.Process(server.pid)
        empty = Load.of(process)

        started = group.run("start")
        yield "start: until all ranks have connected and agreed", _longest(started, "seconds")
        yield "start: requests per rank", f"{_total(started, 'requests') / ranks:.1f}"
        yield "start: requests of rank 0", f"{started[0]['requests_of_rank_0']:.0f}"

        group.run("watch")
        before = Load.of(process)
        beats = group.run("beats")
        loaded = Load.of(process)
        requests = _total(beats, "requests")
        cpu_s, duration_s = loaded.cpu_s - before.cpu_s, max(each["seconds"] for each in beats)
        yield "heartbeats: requests per rank and second", f"{requests / ranks / duration_s:.2f}"
        yield "heartbeats: requests per second in total", f"{requests / duration_s:,.0f}"
        yield "heartbeats: CPU time of the store per request", f"{1e6 * cpu_s / requests:.1f} us"
        yield "heartbeats: share of a core that the store uses", f"{cpu_s / duration_s:.1%}"
        yield "heartbeats: longest round of all ranks", _longest(beats, "longest_round_s")
        yield "heartbeats: CPU time of rank 0 per second", f"{1e3 * beats[0]['turn_cpu_s_of_rank_0']:.1f} ms"
        yield "store: connections", f"{loaded.connections - empty.connections:,}"
        yield "store: memory", f"{(loaded.memory_bytes - empty.memory_bytes) / MIB:,.0f} MiB"

        group.run("mirror")
        before = Load.of(process)
        uploaded = group.run("upload")
        cpu_s = Load.of(process).cpu_s - before.cpu_s
        yield "upload: until rank 0 has the results of all ranks", _longest(uploaded, "seconds")
        yield "upload: requests per rank", f"{_total(uploaded, 'requests') / ranks:.1f}"
        yield "upload: CPU time of the store", f"{cpu_s:.2f} s"

        searched = group.run("search")
        assert all(each["named"] == each["ranks"] for each in searched), searched
        row = "lost rank: from the launcher's SIGTERM until all other ranks have found out which rank is lost"
        yield row, _longest(searched, "seconds")

        lost = group.run("lost")
        assert all(each["named"] == each["ranks"] for each in lost), lost
        row = f"silent rank (limit {timeout_s:.0f} s): until {{}} found out which rank is silent"
        yield row.format("rank 0 has"), f"{lost[0]['noticed_s']:.1f} s"
        yield row.format("all ranks have"), _longest(lost, "all_noticed_s")


def _longest(measured: list[dict[str, float]], key: str) -> str:
    return f"{max(each[key] for each in measured):.1f} s"


def _total(measured: list[dict[str, float]], key: str) -> float:
    return sum(each[key] for each in measured)


SERVER = """
import sys
from torch._C._distributed_c10d import TCPStore
store = TCPStore("localhost", int(sys.argv[1]), None, True, wait_for_workers=False)
print("ready", flush=True)
sys.stdin.read()
"""

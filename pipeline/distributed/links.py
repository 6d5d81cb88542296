"""Measure the links between hosts, to find the host whose link is slow."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.distributed.world import World
from pipeline.hardware.device import copy_to, synchronize

MESSAGE_BYTES = 4 << 20
#: The link of a host is slow if all other links are this many times as fast.
SLOW_FACTOR = 2.0


@dataclass(frozen=True)
class Link:
    """A connection through which a rank sends to a rank on another host."""

    sender: int
    receiver: int
    bytes_per_s: float


def measure_links(world: World, hosts: Sequence[str], message_bytes: int = MESSAGE_BYTES) -> list[Link]:
    """Measure how fast each rank sends a message to the next rank. Return the links between different hosts.

    Every rank must call this. No rank sends and receives at the same time, so links do not slow each other down.

    Args:
        hosts: the host name of each rank.
    """
    message = torch.zeros(message_bytes, dtype=torch.uint8, device=world.device)
    seconds = torch.zeros(world.size)
    _time_to_receive(world, message[:1])  # NCCL connects two ranks when they first communicate
    seconds[world.rank] = _time_to_receive(world, message)
    rates = message_bytes / world.sum(copy_to(seconds, world.device))
    links = [Link((rank - 1) % world.size, rank, rate) for rank, rate in enumerate(rates.tolist())]
    return [link for link in links if hosts[link.sender] != hosts[link.receiver]]


def _time_to_receive(world: World, message: torch.Tensor) -> float:
    """Send a message to the next rank. Return the seconds until the previous rank's message has arrived."""
    seconds = 0.0
    for turn in range(2 + world.size % 2):
        world.barrier()
        started = time.perf_counter()
        if _turn_of(world.rank, world.size) == turn:
            dist.send(message, (world.rank + 1) % world.size, group=world.group)
        sender = (world.rank - 1) % world.size
        if _turn_of(sender, world.size) == turn:
            dist.recv(message, sender, group=world.group)
            synchronize(world.device)
            seconds = time.perf_counter() - started
    return seconds


def _turn_of(sender: int, size: int) -> int:
    """Return the turn in which a rank sends. Two neighbours never send in the same turn."""
    return 2 if size % 2 and sender == size - 1 else sender % 2


def describe_links(links: Sequence[Link], hosts: Sequence[str]) -> str:
    """Return a text that names the host whose links are all slow. Without such a host, it names the slowest link.

    Args:
        hosts: the host name of each rank, at least two different names.
    """
    for host in dict.fromkeys(hosts):
        own = [link.bytes_per_s for link in links if host in (hosts[link.sender], hosts[link.receiver])]
        others = [link.bytes_per_s for link in links if host not in (hosts[link.sender], hosts[link.receiver])]
        if others and min(others) > SLOW_FACTOR * max(own):
            ranks = ", ".join(str(rank) for rank, name in enumerate(hosts) if name == host)
            return (
                f"slow link: {host} (rank {ranks}) sends and receives {_megabytes(min(own))} to {_megabytes(max(own))} "
                f"MB/s, the other links transfer at least {_megabytes(min(others))} MB/s"
            )
    slowest, fastest = min(links, key=_rate), max(links, key=_rate)
    sender, receiver = (f"rank {rank} on {hosts[rank]}" for rank in (slowest.sender, slowest.receiver))
    return (
        f"slow network: the links between the hosts transfer {_megabytes(slowest.bytes_per_s)} to "
        f"{_megabytes(fastest.bytes_per_s)} MB/s; the slowest is from {sender} to {receiver}"
    )


def _rate(link: Link) -> float:
    return link.bytes_per_s


def _megabytes(bytes_per_s: float) -> str:
    megabytes = bytes_per_s / 1e6
    return f"{megabytes:,.0f}" if megabytes >= 100 else f"{megabytes:.3g}"

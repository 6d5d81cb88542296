"""Estimate the time of collectives from the bandwidths and latencies of the links between ranks.

The estimate assumes that each collective uses its fastest algorithm, as NCCL 2.12 does (``src/graph/tuning.cc``). Gloo
is different: it always uses a ring for an all-reduce.

In the formulas, n is the size of a collective's input in bytes. For an all-gather, n is the size of the output. p is
the number of ranks, h is the number of hosts, and a host has g = p / h ranks.

Each rank has a link within its host, with bandwidth B_host and latency a_host. Each rank also has a link to other
hosts, with bandwidth B_net and latency a_net. On one host, B is B_host. On several hosts, NCCL's rings together use all
network adapters, so B is min(B_host, g B_net).

=============  ====================================================================================  ===================
algorithm      time                                                                                  used for
=============  ====================================================================================  ===================
ring           (p - 1) n / (p B) + (p - h) a_host + (h - 1) a_net                                    all-gather,
                                                                                                     reduce-scatter
ring           twice the time of the row above                                                       all-reduce
tree           2 n / B + 2 (g - 1) a_host + 2 ceil(log2 h) a_net                                     all-reduce
hierarchical   the sum for three collectives: reduce-scatter of n within each host, all-reduce of    all-reduce
               n / g between hosts, and all-gather of n within each host
pairwise       max((g - 1) n / (p B_host), (p - g) n / (p B_net)) + (g - 1) a_host + (p - g) a_net   all-to-all
=============  ====================================================================================  ===================
"""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
#: The bytes that a rank sends, in units of n (p - 1) / p. n is the size of the input, or of an all-gather's output.
_SENT_SHARES: dict[Kind, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


@dataclass(frozen=True)
class Link:
    """The connection of one rank to other ranks. The bandwidth is that of one direction."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Group:
    """A group of ranks that run a collective together. Consecutive rank numbers in the group differ by ``stride``.

    Every rank of the run is in exactly one such group. All groups have the same ``size`` and ``stride``, and
    communicate at the same time.
    """

    size: int
    stride: int = 1


@dataclass(frozen=True)
class Collective:
    """A collective that each rank issues with the other ranks of its group."""

    kind: Kind
    size: int  # n, in bytes
    group: Group

    @property
    def sent_bytes(self) -> float:
        """Return how many bytes each rank sends, as a mean over the ranks."""
        return _SENT_SHARES[self.kind] * self.size * (self.group.size - 1) / self.group.size


@dataclass(frozen=True)
class Cluster:
    """Hosts with ``per_host`` ranks each. Consecutive ranks are on the same host."""

    per_host: int
    within_host: Link
    between_hosts: Link  # a rank's share of the network adapters of its host

    def hosts_of(self, group: Group) -> int:
        """Return how many hosts the ranks of a group use."""
        if self.per_host % (group.size * group.stride) == 0:
            return 1
        return max(2, -(-group.size // max(1, self.per_host // group.stride)))

    def seconds(self, collective: Collective) -> float:
        return min(self.seconds_by_algorithm(collective).values(), default=0.0)

    def seconds_by_algorithm(self, collective: Collective) -> dict[str, float]:
        """Return the seconds that a collective takes, by algorithm. For a group of one rank, the result is empty."""
        size, group = collective.size, collective.group
        hosts = self.hosts_of(group)
        if group.size == 1:
            return {}
        if collective.kind == "all_to_all":
            return {"pairwise": self._pairwise(size, group.size, hosts)}
        ring = self._ring(size, group.size, hosts)
        if collective.kind != "all_reduce":
            return {"ring": ring}
        times = {"ring": 2 * ring, "tree": self._tree(size, group.size, hosts)}
        if 1 < hosts < group.size:
            times["hierarchical"] = self._hierarchical(size, group.size, hosts)
        return times

    def _bandwidth(self, ranks: int, hosts: int) -> float:
        if hosts == 1:
            return self.within_host.bytes_per_s
        per_host = ranks // hosts
        between = per_host * self.between_hosts.bytes_per_s
        return between if per_host == 1 else min(self.within_host.bytes_per_s, between)

    def _ring(self, size: float, ranks: int, hosts: int) -> float:
        latency_s = (ranks - hosts) * self.within_host.latency_s + (hosts - 1) * self.between_hosts.latency_s
        return (ranks - 1) / ranks * size / self._bandwidth(ranks, hosts) + latency_s

    def _tree(self, size: float, ranks: int, hosts: int) -> float:
        depth = math.ceil(math.log2(hosts))
        latency_s = (ranks // hosts - 1) * self.within_host.latency_s + depth * self.between_hosts.latency_s
        return 2 * (size / self._bandwidth(ranks, hosts) + latency_s)

    def _hierarchical(self, size: float, ranks: int, hosts: int) -> float:
        per_host = ranks // hosts
        between = min(2 * self._ring(size / per_host, hosts, hosts), self._tree(size / per_host, hosts, hosts))
        return 2 * self._ring(size, per_host, 1) + between

    def _pairwise(self, size: float, ranks: int, hosts: int) -> float:
        near, far = ranks // hosts - 1, ranks - ranks // hosts
        times = [peers / ranks * size / link.bytes_per_s for peers, link in self._peers(near, far)]
        return max(times) + sum(peers * link.latency_s for peers, link in self._peers(near, far))

    def _peers(self, near: int, far: int) -> list[tuple[int, Link]]:
        return [(near, self.within_host), (far, self.between_hosts)]

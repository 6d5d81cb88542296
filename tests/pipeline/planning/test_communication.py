"""Times of collectives, compared with values that are computed by hand. The units are bytes and seconds."""

from __future__ import annotations

import pytest

from pipeline.planning.communication import Cluster, Collective, Group, Kind, Link

#: Hosts with four ranks.
CLUSTER = Cluster(4, within_host=Link(100.0, 1.0), between_hosts=Link(10.0, 5.0))


@pytest.mark.parametrize(
    ("kind", "group", "expected"),
    [
        ("all_reduce", Group(1), {}),
        # Two rounds: 3/4 of 800 bytes at 100 bytes/s, and three messages.
        ("all_reduce", Group(4), {"ring": 2 * (6 + 3), "tree": 2 * (8 + 3)}),
        ("reduce_scatter", Group(4), {"ring": 6 + 3}),
        # Two hosts: 7/8 of 800 bytes at four times 10 bytes/s, six messages within hosts and one between them.
        ("all_gather", Group(8), {"ring": 17.5 + 6 + 5}),
        # The hierarchy: 3/4 of 800 bytes within the host, and twice 1/2 of 200 bytes at 10 bytes/s between the hosts.
        (
            "all_reduce",
            Group(8),
            {"ring": 2 * (17.5 + 6 + 5), "tree": 2 * (20 + 3 + 5), "hierarchical": 2 * (6 + 3) + 2 * (10 + 5)},
        ),
        # One rank on each of two hosts, which has a quarter of the bandwidth of its host.
        ("all_reduce", Group(2, stride=4), {"ring": 2 * (40 + 5), "tree": 2 * (80 + 5)}),
        # Two ranks on each of two hosts.
        ("all_gather", Group(4, stride=2), {"ring": 30 + 2 + 5}),
        # Four peers on the other host, for which 1/2 of the bytes are, and three on the own host.
        ("all_to_all", Group(8), {"pairwise": 40 + 3 + 4 * 5}),
        ("all_to_all", Group(4), {"pairwise": 6 + 3}),
    ],
)
def test_time_of_a_collective(kind: Kind, group: Group, expected: dict[str, float]) -> None:
    collective = Collective(kind, 800, group)
    assert CLUSTER.seconds_by_algorithm(collective) == pytest.approx(expected)
    assert CLUSTER.seconds(collective) == pytest.approx(min(expected.values(), default=0.0))


def test_a_ring_is_limited_by_the_slower_link() -> None:
    fast_network = Cluster(4, within_host=Link(100.0, 0.0), between_hosts=Link(1000.0, 0.0))
    assert fast_network.seconds(Collective("all_gather", 800, Group(8))) == pytest.approx(7 / 8 * 800 / 100)


@pytest.mark.parametrize(("size", "fastest"), [(1000, "tree"), (10**9, "ring")])
def test_small_messages_between_many_hosts_take_the_tree(size: int, fastest: str) -> None:
    """64 hosts with one rank: 126 messages one after the other in the ring, and 12 in the tree."""
    cluster = Cluster(1, within_host=Link(1e9, 0.0), between_hosts=Link(1e9, 1e-5))
    times = cluster.seconds_by_algorithm(Collective("all_reduce", size, Group(64)))
    assert min(times, key=times.__getitem__) == fastest
    assert times == pytest.approx(
        {"ring": 2 * (63 / 64 * size / 1e9 + 63e-5), "tree": 2 * (size / 1e9 + 6e-5)}, rel=1e-9
    )


@pytest.mark.parametrize(
    ("per_host", "group", "hosts"),
    [(8, Group(8), 1), (8, Group(2), 1), (8, Group(3), 2), (8, Group(12), 2), (8, Group(2, 4), 1), (8, Group(4, 8), 4)],
)
def test_hosts_of_a_group(per_host: int, group: Group, hosts: int) -> None:
    """Groups of three ranks do not fill hosts with eight ranks, so some of them need two hosts."""
    assert Cluster(per_host, Link(1.0, 0.0), Link(1.0, 0.0)).hosts_of(group) == hosts


@pytest.mark.parametrize(
    ("kind", "sent"), [("all_reduce", 1400), ("all_gather", 700), ("reduce_scatter", 700), ("all_to_all", 700)]
)
def test_sent_bytes(kind: Kind, sent: int) -> None:
    assert Collective(kind, 800, Group(8)).sent_bytes == sent

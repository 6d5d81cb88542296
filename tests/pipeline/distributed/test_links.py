"""The host whose link is slow is named. ``test_network_interface.py`` measures a real slow link."""

from __future__ import annotations

import pytest

from pipeline.distributed.links import Link, _turn_of, describe_links

HOSTS = ["node0", "node0", "node1", "node1", "node2", "node2"]


def ring(*rates: float) -> list[Link]:
    """Return the links from node0 to node1, from node1 to node2, and from node2 to node0. Rates are in MB/s."""
    pairs = ((1, 2), (3, 4), (5, 0))
    return [Link(sender, receiver, 1e6 * rate) for (sender, receiver), rate in zip(pairs, rates, strict=True)]


def test_a_host_with_slow_links_in_both_directions_is_named() -> None:
    assert describe_links(ring(1300.0, 2.4, 2.5), HOSTS) == (
        "slow link: node2 (rank 4, 5) sends and receives 2.4 to 2.5 MB/s, the other links transfer at least 1,300 MB/s"
    )


@pytest.mark.parametrize("rates", [(400.0, 390.0, 300.0), (2.4, 400.0, 400.0), (2.4, 2.5, 2.6)])
def test_otherwise_the_slowest_link_is_named(rates: tuple[float, ...]) -> None:
    """The links may be equally fast, or slow in one direction, so that either end can be the cause."""
    text = describe_links(ring(*rates), HOSTS)
    assert text.startswith(f"slow network: the links between the hosts transfer {min(rates):g} to {max(rates):g} MB/s")
    slowest = {rates[0]: "rank 1 on node0 to rank 2 on node1", rates[2]: "rank 5 on node2 to rank 0 on node0"}
    assert text.endswith(f"; the slowest is from {slowest[min(rates)]}")


@pytest.mark.parametrize("size", range(2, 8))
def test_no_rank_sends_and_receives_in_the_same_turn(size: int) -> None:
    turns = [_turn_of(rank, size) for rank in range(size)]
    assert set(turns) == set(range(2 + size % 2))
    for rank in range(size):
        assert turns[rank] != turns[(rank + 1) % size]

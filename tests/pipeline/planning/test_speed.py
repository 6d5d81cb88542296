"""The duration of a step, compared with schedules that are computed by hand.

A collective of n bytes takes n seconds, except where a test says otherwise.
"""

from __future__ import annotations

import pytest

from pipeline.planning.collectives import Stage, StepCollectives
from pipeline.planning.communication import Cluster, Collective, Group, Link
from pipeline.planning.speed import communication_waits, compute_seconds, micro_step_seconds

CLUSTER = Cluster(2, within_host=Link(0.5, 0.0), between_hosts=Link(1e-9, 0.0))


def seconds(n: int) -> tuple[Collective, ...]:
    return (Collective("all_gather", n, Group(2)),) if n else ()


def stages_of(*stages: tuple[int, int, int]) -> list[Stage]:
    """Return stages from the seconds of their gathers, computation and reductions."""
    return [Stage(compute, 0, (), seconds(gather), seconds(reduction)) for gather, compute, reduction in stages]


@pytest.mark.parametrize(
    ("stages", "overlapping", "one_by_one"),
    [
        ([(0, 5, 0), (0, 5, 0)], 10, 10),
        # Reductions: the first overlaps with the second stage, and the last with nothing.
        ([(0, 5, 4), (0, 5, 3)], 13, 17),
        ([(0, 5, 8), (0, 5, 3)], 16, 21),
        # Gathers: the second one starts with the first stage.
        ([(2, 5, 0), (4, 5, 0)], 12, 16),
        ([(2, 5, 0), (9, 5, 0)], 16, 21),
        # The gather of the second stage is issued before the reduction of the first stage, which ends at 2 + 7 + 6.
        ([(2, 5, 6), (7, 5, 1)], 16, 26),
    ],
)
def test_duration_of_a_micro_step(stages: list[tuple[int, int, int]], overlapping: int, one_by_one: int) -> None:
    made = stages_of(*stages)
    assert micro_step_seconds(made, 1.0, CLUSTER, overlaps=True) == pytest.approx(overlapping)
    assert micro_step_seconds(made, 1.0, CLUSTER, overlaps=False) == pytest.approx(one_by_one)


def test_waits_are_divided_by_their_cause() -> None:
    """Two hosts with two ranks: 1/2 of 8 bytes within hosts, and 3/4 of 8 bytes at 2 x 1 byte/s between them."""
    cluster = Cluster(2, within_host=Link(4.0, 0.5), between_hosts=Link(1.0, 0.25))
    within, between = Collective("all_gather", 8, Group(2)), Collective("all_gather", 8, Group(4))
    step = StepCollectives([], [], stages_of((0, 3, 0)), 1, [within, between])
    waits = communication_waits(step, 1.0, cluster, overlaps=True)
    assert compute_seconds(step, 1.0) == 3
    assert waits.latency_s == pytest.approx(0.5 + (2 * 0.5 + 0.25))
    # With an infinite network, the larger group would be limited by the links within the hosts: 3/4 of 8 bytes.
    assert waits.within_host_s == pytest.approx(1 + 1.5)
    assert waits.between_hosts_s == pytest.approx(3 - 1.5)
    assert waits.total_s == pytest.approx(1.75 + 1 + 3)


def test_micro_steps_are_counted() -> None:
    first, middle, last = stages_of((4, 1, 0)), stages_of((0, 1, 0)), stages_of((0, 1, 2))
    step = StepCollectives(first, middle, last, 5, [])
    assert compute_seconds(step, 2.0) == 10
    assert communication_waits(step, 2.0, CLUSTER, overlaps=True).total_s == pytest.approx(4 + 2)
    assert step.sent_bytes == (4 + 2) / 2

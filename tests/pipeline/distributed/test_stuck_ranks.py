"""A stuck rank is told from ranks that work, wait for others, or are in a phase that takes long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.distributed.main_thread import LOOP_FACTOR, Place
from pipeline.distributed.progress import PATIENCE_S
from pipeline.distributed.stuck_ranks import describe_places, find_stuck

TIMEOUT_S = 60.0
MOVING = Place(position=7, phase="step 5, optimizer", is_patient=False, idle_s=0.0, line="trainer.py:1 in train_step")
IDLE = replace(MOVING, idle_s=61.0)
SLOW = replace(IDLE, longest_wait_s=28.0)  # for example in an all-reduce on a slow network
BEHIND = replace(IDLE, position=6, phase="step 5, waiting for data", line="loader.py:2 in _read")
PATIENT = replace(BEHIND, is_patient=True)
OUT_OF_PATIENCE = replace(PATIENT, idle_s=PATIENCE_S + 1)
SPINS = replace(MOVING, busy_s=61.0, longest_s=2.0)  # for example in a wait for a GPU
LOOPS = replace(SPINS, position=6)
WORKS = replace(LOOPS, longest_s=61.0 / LOOP_FACTOR)
FIRST = replace(LOOPS, longest_s=0.0)


@pytest.mark.parametrize(
    ("places", "stuck"),
    [
        pytest.param([MOVING, MOVING], [], id="all move"),
        pytest.param([IDLE, replace(MOVING, position=6)], [], id="a rank waits for one that works"),
        pytest.param([IDLE, BEHIND], [1], id="a rank waits for one that does not"),
        pytest.param([MOVING, BEHIND, IDLE], [1], id="a rank that waits for its GPU uses CPU time"),
        pytest.param([MOVING, IDLE], [], id="the rank that is still may wait for the other one"),
        pytest.param([IDLE, IDLE], [0, 1], id="all are still at the same mark"),
        pytest.param([IDLE], [0], id="the only rank"),
        pytest.param([SLOW, replace(SLOW, position=6)], [], id="all wait as long as they have waited before"),
        pytest.param([SLOW, BEHIND], [1], id="a rank waits on a slow network for one that does not move"),
        pytest.param([replace(SLOW, longest_wait_s=20.0)], [0], id="a rank waits for longer than ever before"),
        pytest.param([IDLE, PATIENT], [], id="the rank behind compiles"),
        pytest.param([IDLE, OUT_OF_PATIENCE], [1], id="the rank behind has compiled for too long"),
        pytest.param([BEHIND, IDLE, BEHIND], [0, 2], id="two ranks are behind"),
        pytest.param([IDLE, LOOPS], [1], id="a rank waits for one that loops"),
        pytest.param([SPINS, LOOPS], [1], id="a rank waits with its GPU for one that loops"),
        pytest.param([SPINS, BEHIND], [1], id="a rank waits with its GPU for one that is still"),
        pytest.param([SPINS], [0], id="the only rank waits for its GPU"),
        pytest.param([SPINS, SPINS], [0, 1], id="all wait for their GPUs"),
        pytest.param([IDLE, WORKS], [], id="the rank behind works as long as it has worked before"),
        pytest.param([IDLE, FIRST], [], id="the rank behind does its first work"),
        pytest.param([SPINS, replace(MOVING, position=6)], [], id="a rank waits with its GPU for one that works"),
        pytest.param([SPINS, MOVING], [], id="a rank waits with its GPU for one in the same collective"),
        pytest.param([SPINS, PATIENT], [], id="a rank waits with its GPU for one that compiles"),
    ],
)
def test_ranks_are_stuck_if_they_hold_up_the_others(places: list[Place], stuck: list[int]) -> None:
    assert find_stuck(dict(enumerate(places)), TIMEOUT_S) == stuck


def test_a_longer_timeout_is_also_that_of_patient_phases() -> None:
    assert find_stuck({0: OUT_OF_PATIENCE}, PATIENCE_S + 2) == []


def test_stuck_ranks_are_described_first() -> None:
    text = describe_places(dict(enumerate([IDLE, BEHIND])), [1], {1: "host, pid 5"}.__getitem__)
    assert text == (
        "rank 1 (host, pid 5): not moved for 61 s, in step 5, waiting for data (loader.py:2 in _read); "
        "rank 0: in step 5, optimizer (trainer.py:1 in train_step)"
    )


def test_a_loop_is_described_with_its_cpu_time() -> None:
    text = describe_places({0: LOOPS}, [0], {0: "host, pid 5"}.__getitem__)
    assert text.startswith("rank 0 (host, pid 5): no progress in 61 s of CPU time (at most 2 s before), in step 5, ")


def test_many_ranks_are_counted() -> None:
    text = describe_places(dict.fromkeys(range(10), MOVING), [], {}.__getitem__)
    assert text.startswith("rank 0, rank 1, rank 2, rank 3 and 6 more: in step 5")

"""Threads return results in order, and a failure of one ends them all."""

from __future__ import annotations

import threading
import time

import pytest

from data_tools.threads import Advance, map_threads, no_progress


@pytest.mark.parametrize("workers", [1, 3, None])
def test_results_are_in_the_order_of_the_items(workers: int | None) -> None:
    def work(item: int, advance: Advance) -> int:
        time.sleep(0.001 * (5 - item))
        advance(item)
        return item * item

    told: list[int] = []
    assert map_threads(work, range(5), workers, told.append) == [0, 1, 4, 9, 16]
    assert told[0] == 0 and sorted(told[1:]) == [0, 1, 2, 3, 4]
    assert map_threads(work, [], workers, no_progress) == []


def test_progress_is_reported_by_one_thread_at_a_time() -> None:
    inside = threading.Semaphore(1)

    def advance(done_bytes: int) -> None:
        assert inside.acquire(blocking=False), "two at once"
        time.sleep(0.001)
        inside.release()

    def work(item: int, advance: Advance) -> None:
        for _ in range(10):
            advance(1)

    map_threads(work, range(4), 4, advance)


def test_the_first_failure_in_order_is_raised_and_the_others_are_ended() -> None:
    started: list[int] = []
    ended = threading.Event()

    def work(item: int, advance: Advance) -> None:
        started.append(item)
        if item == 0:
            time.sleep(0.05)
            raise ValueError("of the first")
        try:
            for _ in range(2000):  # far longer than the first takes to fail
                advance(1)
                time.sleep(0.005)
        except BaseException:
            ended.set()
            raise

    with pytest.raises(ValueError, match="of the first"):
        map_threads(work, range(50), 2, no_progress)
    assert ended.is_set() and len(started) < 50

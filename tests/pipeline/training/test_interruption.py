"""A signal is recorded and all ranks agree on it; a second Ctrl-C ends the process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from pipeline.distributed.world import World
from pipeline.training import interruption
from pipeline.training.interruption import STOP_SIGNALS, StopRequest


def send(number: signal.Signals) -> None:
    """Send a real signal to this process, and return after it has been handled."""
    os.kill(os.getpid(), number)
    time.sleep(0.001)


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_recorded_and_agreed_on(world: World, number: signal.Signals) -> None:
    request = StopRequest(world)
    with request.listening():
        assert request.agreed() is None
        send(number)
        assert request.agreed() is number
        assert request.agreed() is number
    assert request.agreed() is number, "still recorded after listening"


def test_without_a_signal_there_is_no_request(world: World) -> None:
    request = StopRequest(world)
    with request.listening():
        pass
    assert request.agreed() is None


def test_the_first_of_several_is_the_reason(world: World) -> None:
    """A scheduler sends a warning first, and another signal at the time limit."""
    request = StopRequest(world)
    with request.listening():
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert request.agreed() is signal.SIGUSR1


def test_earlier_handlers_are_restored(world: World) -> None:
    received_signals: list[int] = []
    before = {
        number: signal.signal(number, lambda received, frame: received_signals.append(received))
        for number in STOP_SIGNALS
    }
    with StopRequest(world).listening():
        send(signal.SIGTERM)
    assert received_signals == []
    for number in STOP_SIGNALS:
        send(number)
    assert received_signals == list(STOP_SIGNALS)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_earlier_handlers_are_restored_after_an_error(world: World) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(ValueError, match="the step failed"), StopRequest(world).listening():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
        raise ValueError("the step failed")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_handlers_stay_after_the_error_of_a_lost_rank(world: World) -> None:
    """The launcher sends SIGTERM while this rank is still finding out which rank was lost."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.raises(RuntimeError, match="connection closed by peer"), StopRequest(world).listening():
        raise RuntimeError("connection closed by peer")
    send(signal.SIGTERM)
    for number, handler in before.items():
        signal.signal(number, handler)


class TestRepeatedSignals:
    def test_a_ctrl_c_that_the_launcher_forwards_is_one_request(self, world: World) -> None:
        request = StopRequest(world)
        with request.listening():
            send(signal.SIGINT)
            send(signal.SIGINT)
            send(signal.SIGTERM)
            send(signal.SIGINT)
            assert request.agreed() is signal.SIGINT

    @pytest.mark.parametrize("first", STOP_SIGNALS, ids=lambda number: number.name)
    def test_a_later_ctrl_c_ends_the_process(
        self, world: World, monkeypatch: pytest.MonkeyPatch, first: signal.Signals
    ) -> None:
        monkeypatch.setattr(interruption, "_ONE_REQUEST_S", 0.05)
        request = StopRequest(world)
        with pytest.raises(KeyboardInterrupt), request.listening():
            send(first)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            pytest.fail("the second Ctrl-C had no effect")
        assert request.agreed() is first

    @pytest.mark.parametrize("later", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
    def test_a_second_signal_of_a_scheduler_changes_nothing(
        self, world: World, monkeypatch: pytest.MonkeyPatch, later: signal.Signals
    ) -> None:
        monkeypatch.setattr(interruption, "_ONE_REQUEST_S", 0.0)
        request = StopRequest(world)
        with request.listening():
            send(signal.SIGINT)
            time.sleep(0.01)
            send(later)
            assert request.agreed() is signal.SIGINT

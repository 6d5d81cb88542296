"""A signal is noted and obeyed after the step; a person who insists gets through."""

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
    """A real signal to this process, handled before this returns."""
    os.kill(os.getpid(), number)
    time.sleep(0.001)


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_and_agreed_on(world: World, number: signal.Signals) -> None:
    request = StopRequest(world)
    with request.listening():
        assert request.agreed() is None
        send(number)
        assert request.agreed() is number
        assert request.agreed() is number
    assert request.agreed() is number, "the end of listening does not forget it"


def test_without_a_signal_nothing_is_asked(world: World) -> None:
    request = StopRequest(world)
    with request.listening():
        pass
    assert request.agreed() is None


def test_the_first_of_several_is_the_reason(world: World) -> None:
    """A scheduler warns first, and asks again before the time is up."""
    request = StopRequest(world)
    with request.listening():
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert request.agreed() is signal.SIGUSR1


def test_handlers_of_before_are_put_back(world: World) -> None:
    heard: list[int] = []
    before = {number: signal.signal(number, lambda received, frame: heard.append(received)) for number in STOP_SIGNALS}
    with StopRequest(world).listening():
        send(signal.SIGTERM)
    assert heard == []
    for number in STOP_SIGNALS:
        send(number)
    assert heard == list(STOP_SIGNALS)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_handlers_are_put_back_after_an_error(world: World) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(ValueError, match="the step failed"), StopRequest(world).listening():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
        raise ValueError("the step failed")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_who_lost_another_rank_is_not_cut_off(world: World) -> None:
    """The launcher's SIGTERM comes while this rank finds out whom it lost, to say so."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.raises(RuntimeError, match="connection closed by peer"), StopRequest(world).listening():
        raise RuntimeError("connection closed by peer")
    send(signal.SIGTERM)
    for number, handler in before.items():
        signal.signal(number, handler)


class TestInsisting:
    def test_the_same_ctrl_c_passed_on_by_a_launcher_is_one_request(self, world: World) -> None:
        request = StopRequest(world)
        with request.listening():
            send(signal.SIGINT)
            send(signal.SIGINT)
            send(signal.SIGTERM)
            send(signal.SIGINT)
            assert request.agreed() is signal.SIGINT

    @pytest.mark.parametrize("first", STOP_SIGNALS, ids=lambda number: number.name)
    def test_a_later_ctrl_c_is_an_ordinary_one(
        self, world: World, monkeypatch: pytest.MonkeyPatch, first: signal.Signals
    ) -> None:
        monkeypatch.setattr(interruption, "_ONE_REQUEST_S", 0.05)
        request = StopRequest(world)
        with pytest.raises(KeyboardInterrupt), request.listening():
            send(first)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            pytest.fail("the second Ctrl-C was not heard")
        assert request.agreed() is first

    @pytest.mark.parametrize("later", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
    def test_a_scheduler_that_asks_again_changes_nothing(
        self, world: World, monkeypatch: pytest.MonkeyPatch, later: signal.Signals
    ) -> None:
        monkeypatch.setattr(interruption, "_ONE_REQUEST_S", 0.0)
        request = StopRequest(world)
        with request.listening():
            send(signal.SIGINT)
            time.sleep(0.01)
            send(later)
            assert request.agreed() is signal.SIGINT

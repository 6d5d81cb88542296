"""A signal is answered at once and recorded, and all ranks agree on it. A second Ctrl-C ends the process."""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.distributed.world import World
from pipeline.training import interruption
from pipeline.training.interruption import STOP_SIGNALS, StopRequest

RECORDED: queue.SimpleQueue[int] = queue.SimpleQueue()  # the signals that a ``StopRequest`` has handled
LONG_S = 60.0  # longer than any test waits


class Clock:
    """A clock that the test moves, so that a slow machine does not separate two signals."""

    now_s = 1000.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Make signals one request if the test does not move the clock between them."""
    clock, plain = Clock(), StopRequest._record
    while not RECORDED.empty():
        RECORDED.get()

    def record(request: StopRequest, number: int) -> None:
        plain(request, number)
        RECORDED.put(number)

    monkeypatch.setattr(StopRequest, "_record", record)
    monkeypatch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(interruption, "_ONE_REQUEST_S", LONG_S)
    return clock


def send(number: signal.Signals) -> None:
    """Send a real signal to this process, and return after the thread of a ``StopRequest`` has handled it."""
    os.kill(os.getpid(), number)
    assert RECORDED.get(timeout=LONG_S) == number


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def outlives(number: signal.Signals) -> bool:
    """Return whether a child process outlives a signal, such as one that a terminal sends to all its processes."""
    return subprocess.run(["sh", "-c", f"kill -{number.value} $$"], check=False).returncode == 0


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
        assert outlives(number), "Ctrl-C would end the C++ compiler of torch.compile"
    assert request.agreed() is number, "still recorded after listening"
    assert not outlives(number)


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
        os.kill(os.getpid(), number)
        wait_until(lambda number=number: number in received_signals)  # type: ignore[misc]
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
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_nohup_ignores_stays_ignored(world: World) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest(world)
    with request.listening():
        os.kill(os.getpid(), signal.SIGHUP)
        send(signal.SIGTERM)
        assert request.agreed() is signal.SIGTERM
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


class TestAnswer:
    """A signal is answered at once, by a line of the log."""

    def test_while_the_main_thread_runs_no_python(self, world: World, tmp_path: Path) -> None:
        answer = tmp_path / "answer"
        script = f"kill -TERM {os.getpid()}; for i in $(seq 600); do test -s {answer} && exit; sleep 0.05; done; exit 1"
        handler = logging.FileHandler(answer)
        interruption.log.addHandler(handler)
        with StopRequest(world).listening():
            status = ctypes.CDLL(None).system(script.encode())
        interruption.log.removeHandler(handler)
        handler.close()
        assert status == 0, "no answer while the main thread was in one call of C"

    def test_ctrl_c(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        with StopRequest(world).listening():
            send(signal.SIGINT)
        assert caplog.messages == [
            "SIGINT received: finishing the step, then saving; press Ctrl-C again to stop now without saving"
        ]

    def test_other_signals_are_not_keys(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        with StopRequest(world).listening():
            send(signal.SIGUSR1)
        assert caplog.messages == ["SIGUSR1 received: finishing the step, then saving"]

    def test_one_rank_per_node_answers(
        self, world: World, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The first rank of another node prints its answer, because it logs only errors."""
        printed = []
        for local_rank in (0, 1):
            with StopRequest(replace(world, rank=4, local_rank=local_rank)).listening():
                send(signal.SIGUSR1)
            printed.append(capsys.readouterr().err)
        assert printed == ["SIGUSR1 received: finishing the step, then saving\n", ""]
        assert not caplog.messages

    def test_a_second_ctrl_c_does_not_wait_for_the_log(
        self, world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The log and stderr can wait for the reader of a pipe."""
        ended, is_read = threading.Event(), threading.Event()
        monkeypatch.setattr(interruption, "print_error", lambda _: is_read.wait())
        monkeypatch.setattr("os._exit", lambda status: ended.set())
        monkeypatch.setattr(interruption, "_ONE_REQUEST_S", 0.0)  # also the time to wait for the blocked threads
        caplog.handler.acquire()
        try:
            with StopRequest(world).listening():
                send(signal.SIGINT)
                clock.now_s += 1.0
                send(signal.SIGINT)
                assert ended.wait(timeout=LONG_S)
        finally:
            is_read.set()
            caplog.handler.release()

    @pytest.mark.parametrize(
        ("variables", "note"),
        [
            ({"TORCHELASTIC_RUN_ID": "1"}, "torchrun waits for the save"),
            ({"CROSS_SIZE": "1", "LOCAL_SIZE": "2"}, "the deepspeed launcher may end before the save"),
        ],
    )
    def test_a_launcher_prints_more(
        self,
        world: World,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        variables: dict[str, str],
        note: str,
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        before = signal.getsignal(signal.SIGTERM)
        with StopRequest(world).listening():
            send(signal.SIGINT)
        assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN, "the launcher's SIGTERM may come late"
        answer, launcher, *rest = caplog.messages
        assert "finishing the step" in answer and note in launcher and "traceback" in launcher and not rest


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
        self,
        world: World,
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        first: signal.Signals,
    ) -> None:
        statuses: list[int] = []
        monkeypatch.setattr("os._exit", statuses.append)
        request = StopRequest(world)
        with request.listening():
            send(first)
            clock.now_s += LONG_S + 1
            send(signal.SIGINT)
        assert statuses == [128 + signal.SIGINT]
        assert "stopped without saving" in capsys.readouterr().err
        assert request.agreed() is first

    @pytest.mark.parametrize("later", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
    def test_a_second_signal_of_a_scheduler_changes_nothing(
        self, world: World, clock: Clock, later: signal.Signals
    ) -> None:
        request = StopRequest(world)
        with request.listening():
            send(signal.SIGINT)
            clock.now_s += LONG_S + 1
            send(later)
            assert request.agreed() is signal.SIGINT

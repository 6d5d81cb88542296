"""A thread receives signals while the main thread is in one long call."""

from __future__ import annotations

import os
import signal
import threading

from pipeline.distributed.signals import SignalThread


def test_signals_are_heard_while_the_main_thread_waits() -> None:
    heard: list[int] = []
    both = threading.Event()

    def hear(number: int) -> None:
        assert threading.current_thread() is not threading.main_thread()
        heard.append(number)
        if len(heard) == 2:
            both.set()

    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    thread = SignalThread(hear)
    thread.start()
    try:
        for number in numbers:
            os.kill(os.getpid(), number)
        assert both.wait(60)
    finally:
        thread.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sorted(heard) == sorted(numbers)


def test_the_one_that_received_signals_before_receives_them_again() -> None:
    outer: list[int] = []
    inner: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    threads = [SignalThread(outer.append), SignalThread(inner.append)]
    try:
        for thread in threads:
            thread.start()
        os.kill(os.getpid(), signal.SIGUSR1)
        threads[1].stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        threads[0].stop()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert outer == inner == [signal.SIGUSR1]

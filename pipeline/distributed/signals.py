"""Receive signals in a thread, even while the main thread compiles the model or waits for a collective."""

import signal
import socket
import threading
from collections.abc import Callable


class SignalThread:
    """A thread that calls a function for each signal that has a Python handler.

    Python calls a signal handler only between two instructions of the main thread. One instruction can compile the
    model or wait for a collective, so minutes can pass before the handler is called. This thread has no such delay.

    Call all methods from the main thread.

    Args:
        hear: the function to call with the number of the signal. It is called in this object's thread.
    """

    def __init__(self, hear: Callable[[int], None]) -> None:
        self._hear = hear
        self._thread = threading.Thread(target=self._read_signals, name="signals", daemon=True)

    def start(self) -> None:
        """Start the thread.

        While this thread runs, a ``SignalThread`` that was started earlier gets no signals.
        """
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread.start()
        self._before_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def stop(self) -> None:
        """Stop the thread. Before it ends, the thread calls ``hear`` for all signals that have already arrived."""
        signal.set_wakeup_fd(self._before_fd)
        self._writer.close()
        self._thread.join()

    def _read_signals(self) -> None:
        """Read the number of each signal, which the interpreter writes at once, until the other end is closed."""
        with self._reader:
            while numbers := self._reader.recv(64):
                # The kernel delivers signals that arrive together in any order. A launcher's SIGTERM follows Ctrl-C.
                for number in sorted(numbers):
                    self._hear(number)

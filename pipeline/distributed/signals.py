"""Receive signals in a thread, even while the main thread compiles the model or waits for a collective."""

import signal
import socket
import threading
from collections.abc import Callable


class SignalThread:
    """A thread that calls a function for each signal that has a Python handler.

    Python itself calls a handler only between two instructions of the main thread. One instruction, such as a wait for
    a collective, can take minutes. Call all methods of this object from the main thread.

    Args:
        hear: the function that the thread calls. Its argument is the number of the signal.
    """

    def __init__(self, hear: Callable[[int], None]) -> None:
        self._hear = hear
        self._thread = threading.Thread(target=self._read_signals, name="signals", daemon=True)

    def start(self) -> None:
        """Start the thread. While it runs, a ``SignalThread`` that was started earlier gets no signals."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread.start()
        self._before_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def stop(self) -> None:
        """Wait until the thread has called ``hear`` for all signals that have arrived, and stop the thread."""
        signal.set_wakeup_fd(self._before_fd)
        self._writer.close()
        self._thread.join()

    def _read_signals(self) -> None:
        """Call ``hear`` for each signal number that the interpreter writes to the socket, until the socket closes."""
        with self._reader:
            while numbers := self._reader.recv(64):
                # Signals that arrive together have no order. A Ctrl-C comes before the launcher's SIGTERM.
                for number in sorted(numbers):
                    self._hear(number)

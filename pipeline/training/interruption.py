"""Handle signals that ask a run to stop, so that all ranks stop after the same step."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.distributed.environment import launcher_name
from pipeline.distributed.error_messages import print_error
from pipeline.distributed.signals import SignalThread
from pipeline.distributed.world import World
from pipeline.errors import EvaluationStopped

log = logging.getLogger(__name__)

#: SIGTERM comes from schedulers, SIGINT from Ctrl-C, SIGHUP from a terminal that closes, and SIGUSR1 from Slurm with
#: --signal=USR1@120 before the time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
#: torchrun forwards a Ctrl-C that the ranks have already received. A later SIGINT is a second Ctrl-C.
_ONE_REQUEST_S = 1.0
#: What the launchers do with a signal. They print errors of their own after the ranks' last lines.
_LAUNCHER_NOTES = {
    "torchrun": "torchrun waits for the save, at most 30 s unless --shutdown-timeout is longer. "
    "Ignore its messages and its traceback",
    "deepspeed": "after Ctrl-C, the deepspeed launcher may end before the save: wait for the line that says that the "
    "checkpoint is saved. Ignore the launcher's messages and its traceback",
}


class StopRequest:
    """Records signals that ask a run to stop, and tells all ranks.

    After the first signal, a thread immediately logs what the run will do, even while the main thread compiles.
    """

    def __init__(self, world: World) -> None:
        self._world = world.with_cpu_group()
        self.received = 0  # number of the signal that this rank has received, or 0; other ranks may not know it yet
        self._received_at = 0.0
        self._is_agreed = False
        self._answering: threading.Thread | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Return a context manager. Inside its block, signals that ask the run to stop are only recorded.

        A second Ctrl-C ends the process. Programs that the block starts, such as the C++ compiler of torch.compile, do
        not receive these signals.

        If the block raises a ``RuntimeError``, signals are still recorded after the block. A lost rank may have caused
        the error. The launcher then sends SIGTERM, but this process must still print which rank is lost.
        """
        thread = SignalThread(self._record)
        thread.start()
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        if before[signal.SIGHUP] == signal.SIG_IGN:  # nohup: the run must outlive the terminal
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, lambda *_: None)
        # Terminals, torchrun and Slurm also signal the child processes, which inherit this mask from the main thread.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, before)
        stays = False
        try:
            yield
        except RuntimeError:
            stays = True
            raise
        finally:
            if not stays:
                if launcher_name() and (self.received or self._is_agreed):
                    # The launcher's SIGTERM may come late, and must not hide the last line.
                    before[signal.SIGTERM] = signal.SIG_IGN
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                for number, handler in before.items():
                    signal.signal(number, handler)
                thread.stop()
                if self._answering:
                    self._answering.join(timeout=_ONE_REQUEST_S)

    def _record(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
            # The log can wait for the reader of a pipe, but a second Ctrl-C must not wait for the log.
            self._answering = threading.Thread(target=self._answer, args=(signal.Signals(number),), daemon=True)
            self._answering.start()
        elif number == signal.SIGINT and now - self._received_at > _ONE_REQUEST_S:
            line = "error: interrupted again, stopped without saving"
            # Standard error can be a pipe that nobody reads.
            last = threading.Thread(target=print_error, args=(line,), daemon=True)
            last.start()
            last.join(timeout=_ONE_REQUEST_S)
            os._exit(128 + signal.SIGINT)  # the main thread may not run again for minutes

    def _answer(self, number: signal.Signals) -> None:
        """Print, on one rank per node, what the run does after a signal."""
        if self._world.local_rank == 0:
            say = log.warning if self._world.is_main else print_error  # other ranks log only errors
            again = "; press Ctrl-C again to stop now without saving" if number is signal.SIGINT else ""
            say(f"{number.name} received: finishing the step, then saving{again}")
            if launcher := launcher_name():
                say(_LAUNCHER_NOTES[launcher])

    def agreed(self) -> signal.Signals | None:
        """Return a signal that any rank has received, or None. All ranks get the same result.

        Every rank must call this.
        """
        number = self._world.max(self.received)
        self._is_agreed = bool(number)
        return signal.Signals(number) if number else None

    def stop_evaluation(self) -> None:
        """Raise EvaluationStopped if any rank has received a signal. Every rank must call this."""
        if self.agreed():
            raise EvaluationStopped

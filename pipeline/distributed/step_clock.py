"""Measure how a rank spends the time of a step.

- *collective wait*: the rank waits for a collective to finish. Collectives in the background do not count.
- *data wait*: the rank waits for the loader.
- *compute*: the rest of the step.

All ranks take the same time per step, because they wait for the slowest rank. The slowest rank has the most *own time*,
which is compute plus data wait.

On a CPU, the clock measures the main thread. On a GPU, CUDA events measure the stream on which the model computes.

During a step, the clock replaces the functions of torch that wait for a collective. The new functions measure the wait.
DDP waits in C++ code, so the DDP backend must call ``StepClock.backward_pass``.
"""

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, Work
from torch.autograd import Variable

log = logging.getLogger(__name__)

#: The first step compiles. In the second step, DDP rebuilds its buckets, and the ranks agree on them.
SETTLING_STEPS = 2

Mark = Any  # a time of the host in seconds, or a CUDA event
Wait = tuple[Mark, Mark]  # the beginning and the end

#: The methods of a process group that start a collective begin with one of these words. By default, NCCL runs the
#: collective in the stream that computes.
_COLLECTIVES = ("all", "_allgather", "broadcast", "reduce", "_reduce_scatter", "_end_coalescing")


class HostClock:
    """The clock of a rank on a CPU. It measures the time of the main thread."""

    #: (class, name) of each function in which the main thread waits. Gloo runs collectives in other threads.
    waiting_functions: tuple[tuple[type, str], ...] = ((Work, "wait"),)

    def mark(self) -> Mark | None:
        """Return the current time, to pass to ``seconds`` later."""
        return time.perf_counter()

    def has_passed(self, mark: Mark) -> bool:
        """Return True, because a mark on the CPU is always in the past."""
        return True

    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the seconds between two marks."""
        return float(end - start)


class StreamClock:
    """The clock of a rank on a GPU. It measures times on a CUDA stream, and never waits for the GPU."""

    waiting_functions = (
        (Work, "wait"),
        (torch.cuda.Stream, "wait_event"),
        (torch.cuda.Event, "wait"),
        *((ProcessGroup, name) for name in vars(ProcessGroup) if name.startswith(_COLLECTIVES)),
    )

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream()

    def mark(self) -> Mark | None:
        """Record an event in the clock's stream, and return it.

        If another stream is current, record nothing and return None.
        """
        if torch.cuda.current_stream() != self._stream:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def has_passed(self, mark: Mark) -> bool:
        """Return whether the GPU has reached the event ``mark``."""
        return bool(mark.query())

    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the seconds between two events that the GPU has reached."""
        return float(start.elapsed_time(end)) / 1e3


def create_clock(device: torch.device) -> HostClock | StreamClock:
    """Return a clock that measures the time of a device, or of the main thread if the device is not a GPU."""
    return StreamClock() if device.type == "cuda" else HostClock()


@dataclass
class _Step:
    start: Mark
    pauses: list[Wait] = field(default_factory=list)
    data_waits: list[Wait] = field(default_factory=list)
    collective_waits: list[Wait] = field(default_factory=list)
    end: Mark = None


@dataclass(frozen=True)
class StepTimes:
    """How one rank spends the time of a step, as means over several steps. The values add up to the time of a step."""

    compute_s: float = 0.0
    data_wait_s: float = 0.0
    collective_wait_s: float = 0.0


class StepClock:
    """Measures how this rank spends the time of its steps. The first ``SETTLING_STEPS`` steps are not measured.

    Call all methods from the main thread.

    Args:
        is_active: if False, nothing is measured, and no function of torch is replaced. The attribute ``is_active`` is
            also False if this version of torch lacks one of the functions.
        clock: reads the time. If None, a clock for the device is created.
    """

    def __init__(self, device: torch.device, *, is_active: bool, clock: HostClock | StreamClock | None = None) -> None:
        self._clock = clock or create_clock(device)
        self._unmeasured_steps = 0
        self._step: _Step | None = None  # the current step, if it is measured
        self._finished: deque[_Step] = deque()  # the steps whose times are not known yet
        self._ignores_waits = False  # in a pause; in a wait, because a replaced function may call another one
        self._thread_id = threading.get_ident()
        functions = [(owner, name, getattr(owner, name, None)) for owner, name in self._clock.waiting_functions]
        missing = [f"{owner.__name__}.{name}" for owner, name, plain in functions if plain is None]
        if is_active and missing:
            log.warning("the step times of the ranks are not compared: this torch has no %s", ", ".join(missing))
        self.is_active = is_active and not missing
        self._timed = [(owner, name, self._time(plain)) for owner, name, plain in functions if plain is not None]
        self._plain = [(owner, name, vars(owner).get(name)) for owner, name, _ in functions]  # None if it is inherited
        self._forget()

    def _forget(self) -> None:
        self._steps, self._step_s, self._data_s, self._collective_s = 0, 0.0, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Return a context manager that measures one step."""
        if not self.is_active or self._unmeasured_steps < SETTLING_STEPS:
            yield
            self._unmeasured_steps += 1
            return
        self._step = step = _Step(self._clock.mark())
        _assign(self._timed)
        try:
            yield
        finally:
            _assign(self._plain)
            self._step = None
        step.end = self._clock.mark()
        self._finished.append(step)
        self._add_finished()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Return a context manager. The time inside its block counts as data wait."""
        if self._step is None:
            yield
            return
        start = self._clock.mark()
        yield
        self._step.data_waits.append((start, self._clock.mark()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context manager. The time inside its block does not count as a time of the step."""
        if self._step is None:
            yield
            return
        start = self._clock.mark()
        self._ignores_waits = True
        try:
            yield
        finally:
            self._ignores_waits = False
        self._step.pauses.append((start, self._clock.mark()))

    @contextmanager
    def backward_pass(self, loss: Tensor) -> Iterator[None]:
        """Return a context manager for a backward pass of DDP. It measures how long DDP waits at the end of the pass.

        At the end of the pass, DDP queues a callback that waits for the all-reduces. This method queues another
        callback earlier. The earlier callback runs first, and records when DDP begins to wait.
        """
        if self._step is None:
            yield
            return
        computed: list[Mark] = []
        queue_callback = Variable._execution_engine.queue_callback
        # The hook is removed together with this loss.
        loss.register_hook(  # type: ignore[no-untyped-call]
            lambda _: queue_callback(lambda: computed.append(self._clock.mark()))
        )
        yield
        self._add_wait(self._step, computed[0], self._clock.mark())

    def _time(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that calls ``plain`` and records the time of this call as a wait."""

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            step = self._step
            if step is None or self._ignores_waits or not self._computes_here():
                return plain(*args, **kwargs)
            self._ignores_waits = True
            start = self._clock.mark()
            try:
                return plain(*args, **kwargs)
            finally:
                self._ignores_waits = False
                self._add_wait(step, start, self._clock.mark())

        return timed

    def _computes_here(self) -> bool:
        """Return whether the current thread computes: the main thread, or a thread of a backward pass."""
        return threading.get_ident() == self._thread_id or torch._C._current_graph_task_id() != -1

    @staticmethod
    def _add_wait(step: _Step, start: Mark | None, end: Mark | None) -> None:
        if start is not None and end is not None:
            step.collective_waits.append((start, end))

    def _add_finished(self) -> None:
        while self._finished and self._clock.has_passed(self._finished[0].end):
            step = self._finished.popleft()
            self._steps += 1
            self._step_s += self._clock.seconds(step.start, step.end) - self._sum(step.pauses)
            self._data_s += self._sum(step.data_waits)
            self._collective_s += self._sum(step.collective_waits)

    def _sum(self, waits: list[Wait]) -> float:
        return sum(self._clock.seconds(start, end) for start, end in waits)

    def read(self) -> StepTimes | None:
        """Return the mean times per step since the last call, or None if no step was measured.

        A step that the GPU has not finished yet counts in the next call.
        """
        self._add_finished()
        if not self._steps:
            return None
        compute_s = self._step_s - self._data_s - self._collective_s
        times = StepTimes(*(total / self._steps for total in (compute_s, self._data_s, self._collective_s)))
        self._forget()
        return times


def _assign(functions: list[tuple[type, str, Any]]) -> None:
    """Replace functions of classes. If a new function is None, the class inherits it from a base class again."""
    for owner, name, function in functions:
        if function is None:
            delattr(owner, name)
        else:
            setattr(owner, name, function)

"""Measure how a rank spends the time of a step: computing, waiting for data, or waiting in collectives.

In synchronous training, all ranks take the same time per step, because each rank waits for the slowest one in the
collectives. The *own time* of a rank is the time of a step without the waits in collectives. In its own time, a rank
computes or waits for data. The slowest rank is the rank with the most own time.

The module measures the time on the *timeline* of the rank. On a CPU, the timeline is the main thread, and the clock of
the host measures its time. On a GPU, the timeline is the CUDA stream on which the model computes, and CUDA events in
this stream measure its time. The time of a step is divided into three kinds:

- *collective wait*: the timeline waits until a collective has finished. The time in which the collective transfers data
  is included. A collective that runs in the background while the rank computes does not count.
- *data wait*: the timeline waits until the loader has returned the micro-batches.
- *compute*: the rest of the step.

During a step, the clock replaces the functions of torch that wait for a collective. The replacements also measure the
wait, but only in the thread that computes. This works for every backend except DDP, which waits in C++ code. Therefore,
the backend for DDP must call ``StepClock.backward_pass``.
"""

import functools
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

#: The first step compiles. In the second step, DDP rebuilds its buckets, and the ranks agree on them.
SETTLING_STEPS = 2

Mark = Any  # a time of the host in seconds, or a CUDA event
Wait = tuple[Mark, Mark]  # the beginning and the end

#: The methods of a process group that start a collective begin with one of these words. NCCL runs the collective in the
#: stream that computes, unless the caller asks for an asynchronous one.
_COLLECTIVES = ("all", "_allgather", "broadcast", "reduce", "_reduce_scatter", "_end_coalescing")


class HostClock:
    """The clock of a rank that computes on the CPU. It measures the time of the main thread."""

    #: The functions in which the main thread waits for a collective, as pairs of a class and a name. A collective of
    #: gloo runs in other threads.
    waiting_functions: tuple[tuple[type, str], ...] = ((Work, "wait"),)

    def mark(self) -> Mark | None:
        """Return a mark: the current time, to pass to ``seconds`` later."""
        return time.perf_counter()

    def has_passed(self, mark: Mark) -> bool:
        """Return True. On the CPU, a mark is the time at which ``mark`` was called, so it is always in the past."""
        return True

    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the seconds between two marks that ``mark`` has returned."""
        return float(end - start)


class StreamClock:
    """The clock of a rank that computes on a GPU. It measures the time in a CUDA stream. No call waits for the GPU."""

    waiting_functions = (
        (Work, "wait"),
        (torch.cuda.Stream, "wait_event"),
        (torch.cuda.Event, "wait"),
        *((ProcessGroup, name) for name in vars(ProcessGroup) if name.startswith(_COLLECTIVES)),
    )

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream()

    def mark(self) -> Mark | None:
        """Record an event in the stream, and return it as a mark, to pass to ``seconds`` later.

        If the calling thread currently uses another stream, return None.
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


@dataclass
class _Step:
    """The marks of one step."""

    start: Mark
    data_waits: list[Wait] = field(default_factory=list)
    collective_waits: list[Wait] = field(default_factory=list)
    end: Mark = None


@dataclass(frozen=True)
class StepTimes:
    """The mean times of one rank per step, in seconds. The sum of all fields is the time of a step."""

    compute_s: float = 0.0
    data_wait_s: float = 0.0
    collective_wait_s: float = 0.0


class StepClock:
    """Measures how this rank spends the time of its steps, except the first ``SETTLING_STEPS`` steps.

    Call all methods from the main thread.

    Args:
        is_active: if False, this object measures nothing. It should be False if there is only one rank, which never
            waits for other ranks.
        clock: the clock to use. If None, the device determines the clock.
    """

    def __init__(self, device: torch.device, *, is_active: bool, clock: HostClock | StreamClock | None = None) -> None:
        self._is_active = is_active
        self._clock = clock or (StreamClock() if is_active and device.type == "cuda" else HostClock())
        self._unmeasured_steps = 0
        self._step: _Step | None = None  # the current step, if it is measured
        self._finished: deque[_Step] = deque()  # the steps whose times are not known yet
        self._is_waiting = False  # one of the replaced functions may call another one
        self._thread_id = threading.get_ident()
        self._functions = [(owner, name, vars(owner)[name]) for owner, name in self._clock.waiting_functions]
        self._timed = [(owner, name, self._time(plain)) for owner, name, plain in self._functions]
        self._forget()

    def _forget(self) -> None:
        self._steps, self._step_s, self._data_s, self._collective_s = 0, 0.0, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Return a context manager that measures the step in its ``with`` block."""
        if not self._is_active or self._unmeasured_steps < SETTLING_STEPS:
            yield
            self._unmeasured_steps += 1
            return
        self._step = step = _Step(self._clock.mark())
        _assign(self._timed)
        try:
            yield
        finally:
            _assign(self._functions)
            self._step = None
        step.end = self._clock.mark()
        self._finished.append(step)
        self._add_finished()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Return a context manager. The time inside its ``with`` block counts as data wait."""
        if self._step is None:
            yield
            return
        start = self._clock.mark()
        yield
        self._step.data_waits.append((start, self._clock.mark()))

    @contextmanager
    def backward_pass(self, loss: Tensor) -> Iterator[None]:
        """Return a context manager for a backward pass of DDP. It measures how long DDP waits at the end of the pass.

        DDP waits in a callback. The callbacks at the end of a backward pass run in the order in which they were queued,
        and DDP queues its callback when the last gradients are ready. This method queues another callback at the
        beginning of the pass, which therefore runs just before DDP waits.
        """
        if self._step is None:
            yield
            return
        computed: list[Mark] = []
        queue_callback = Variable._execution_engine.queue_callback
        # The hook belongs to this loss, so it needs not be removed.
        loss.register_hook(  # type: ignore[no-untyped-call]
            lambda _: queue_callback(lambda: computed.append(self._clock.mark()))
        )
        yield
        self._add_wait(self._step, computed[0], self._clock.mark())

    def _time(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that calls ``plain`` and records how long the timeline waits in it."""

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            step = self._step
            if step is None or self._is_waiting or not self._computes_here():
                return plain(*args, **kwargs)
            self._is_waiting = True
            start = self._clock.mark()
            try:
                return plain(*args, **kwargs)
            finally:
                self._is_waiting = False
                self._add_wait(step, start, self._clock.mark())

        return timed

    def _computes_here(self) -> bool:
        """Return whether the current thread computes: the main thread, or a thread of torch in a backward pass."""
        return threading.get_ident() == self._thread_id or torch._C._current_graph_task_id() != -1

    @staticmethod
    def _add_wait(step: _Step, start: Mark | None, end: Mark | None) -> None:
        if start is not None and end is not None:
            step.collective_waits.append((start, end))

    def _add_finished(self) -> None:
        """Add up the times of the steps that the timeline has passed."""
        while self._finished and self._clock.has_passed(self._finished[0].end):
            step = self._finished.popleft()
            self._steps += 1
            self._step_s += self._clock.seconds(step.start, step.end)
            self._data_s += self._sum(step.data_waits)
            self._collective_s += self._sum(step.collective_waits)

    def _sum(self, waits: list[Wait]) -> float:
        return sum(self._clock.seconds(start, end) for start, end in waits)

    def read(self) -> StepTimes | None:
        """Return how long a step took on average, divided into computation, waiting for data and waiting for ranks.

        The mean is over the steps since the last call of this method. A step that the GPU has not finished yet counts
        in the next call. If no step was measured, the result is None.
        """
        self._add_finished()
        if not self._steps:
            return None
        compute_s = self._step_s - self._data_s - self._collective_s
        times = StepTimes(*(total / self._steps for total in (compute_s, self._data_s, self._collective_s)))
        self._forget()
        return times


def _assign(functions: list[tuple[type, str, Any]]) -> None:
    for owner, name, function in functions:
        setattr(owner, name, function)

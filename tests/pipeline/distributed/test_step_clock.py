"""The time of a step is divided into computing, waiting for data and waiting in collectives."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch._C._distributed_c10d import Work
from torch.autograd import Variable

from pipeline.distributed.step_clock import SETTLING_STEPS, HostClock, StepClock, StepTimes
from pipeline.distributed.world import World

CPU = torch.device("cpu")


class Collective:
    """A collective; waiting for it takes the given time of the fake clock."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def wait(self) -> str:
        self.clock.now += self.seconds
        return "done"

    def wait_for_two(self) -> None:
        self.wait()
        self.wait()


class FakeClock(HostClock):
    """A clock that a test moves. A mark in the future is one that a GPU has not reached."""

    waiting_functions = ((Collective, "wait"), (Collective, "wait_for_two"))

    def __init__(self) -> None:
        self.now = 0.0
        self.reached = float("inf")

    def mark(self) -> float:
        return self.now

    def has_passed(self, mark: float) -> bool:
        return mark <= self.reached


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def steps(clock: FakeClock) -> Iterator[StepClock]:
    """Give a clock that has seen its first steps, and check that torch's functions are restored."""
    before = dict(vars(Collective))
    steps = StepClock(CPU, is_active=True, clock=clock)
    for _ in range(SETTLING_STEPS):
        with steps.step():
            clock.now += 100.0
    assert steps.read() is None, "the first step compiles"
    yield steps
    assert dict(vars(Collective)) == before


def test_each_second_of_a_step_counts_once(steps: StepClock, clock: FakeClock) -> None:
    for seconds in (1.0, 3.0):
        with steps.step():
            with steps.waiting_for_data():
                clock.now += 0.5
            clock.now += seconds
            assert Collective(clock, 0.25).wait() == "done"
            Collective(clock, 0.125).wait_for_two()
        clock.now += 50.0  # an evaluation
        Collective(clock, 50.0).wait()
    assert steps.read() == StepTimes(compute_s=2.0, data_wait_s=0.5, collective_wait_s=0.5)
    assert steps.read() is None


def test_a_pause_does_not_count(steps: StepClock, clock: FakeClock) -> None:
    """The trainer measures the norms of layers within a step, and sums them over the ranks."""
    with steps.step():
        clock.now += 1.0
        with steps.paused():
            clock.now += 50.0
            Collective(clock, 50.0).wait()
        Collective(clock, 0.5).wait()
    assert steps.read() == StepTimes(compute_s=1.0, collective_wait_s=0.5)
    with steps.paused():
        clock.now += 50.0
    assert steps.read() is None


def test_another_thread_does_not_count(steps: StepClock, clock: FakeClock) -> None:
    """The thread that writes a checkpoint also waits for the other ranks."""
    with steps.step():
        thread = threading.Thread(target=Collective(clock, 7.0).wait)
        thread.start()
        thread.join()
    assert steps.read() == StepTimes(compute_s=7.0)


def test_a_failed_step_does_not_count(steps: StepClock, clock: FakeClock) -> None:
    with pytest.raises(RuntimeError, match="lost"), steps.step():
        clock.now += 9.0
        raise RuntimeError("lost")
    assert steps.read() is None


def test_steps_that_the_gpu_has_not_finished_count_later(steps: StepClock, clock: FakeClock) -> None:
    clock.reached = clock.now + 1.0
    for seconds in (1.0, 2.0, 4.0):
        with steps.step():
            clock.now += seconds
    assert steps.read() == StepTimes(compute_s=1.0)
    clock.reached = clock.now
    assert steps.read() == StepTimes(compute_s=3.0)


def test_the_end_of_a_backward_pass_is_a_wait(steps: StepClock, clock: FakeClock) -> None:
    """As DDP does, a hook of the last gradient queues a callback that waits for the other ranks."""

    def wait_for_ranks() -> None:
        clock.now += 5.0

    def compute(gradient: torch.Tensor) -> None:
        clock.now += 1.0
        Variable._execution_engine.queue_callback(wait_for_ranks)

    weight = torch.ones(3, requires_grad=True)
    weight.register_hook(compute)  # type: ignore[no-untyped-call]
    with steps.step():
        loss = (weight * 2).sum()
        with steps.backward_pass(loss):
            loss.backward()  # type: ignore[no-untyped-call]
    assert steps.read() == StepTimes(compute_s=1.0, collective_wait_s=5.0)


def test_one_rank_measures_nothing(clock: FakeClock) -> None:
    steps = StepClock(CPU, is_active=False, clock=clock)
    for _ in range(SETTLING_STEPS + 1):
        with steps.step(), steps.waiting_for_data():
            clock.now += 1.0
    assert steps.read() is None


class InheritsWait(Collective):
    """A class as of another version of torch, in which a base class has the function."""


def test_a_function_of_a_base_class_is_restored(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "waiting_functions", ((InheritsWait, "wait"),))
    steps = StepClock(CPU, is_active=True, clock=clock)
    for _ in range(SETTLING_STEPS + 1):
        with steps.step():
            InheritsWait(clock, 1.0).wait()
    assert steps.read() == StepTimes(compute_s=0.0, collective_wait_s=1.0)
    assert "wait" not in vars(InheritsWait)


def test_a_torch_without_a_function_trains_without_the_measurement(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clock, "waiting_functions", ((Collective, "wait"), (Collective, "wait_for_three")))
    steps = StepClock(CPU, is_active=True, clock=clock)
    for _ in range(SETTLING_STEPS + 1):
        with steps.step():
            clock.now += 1.0
    assert not steps.is_active and steps.read() is None
    assert caplog.messages == [
        "the step times of the ranks are not compared: this torch has no Collective.wait_for_three"
    ]


def test_a_collective_of_gloo_is_a_wait(world: World) -> None:
    steps = StepClock(CPU, is_active=True)
    plain = vars(Work)["wait"]
    for _ in range(SETTLING_STEPS + 1):
        with steps.step():
            torch.distributed.barrier()
    times = steps.read()
    assert times is not None and times.collective_wait_s > 0 and times.compute_s > 0
    assert vars(Work)["wait"] is plain


@pytest.mark.gpu
def test_a_collective_of_nccl_is_a_wait(gpu_world: World) -> None:
    """Work in another stream, for which the computing stream waits, is no compute time."""
    steps = StepClock(gpu_world.device, is_active=True)
    values, side = torch.ones(1 << 20, device=gpu_world.device), torch.cuda.Stream()
    for _ in range(SETTLING_STEPS + 1):
        with steps.step():
            torch.distributed.all_reduce(values)
            with torch.cuda.stream(side):
                torch.cuda._sleep(1_000_000_000)
            torch.cuda.current_stream().wait_stream(side)
            values.mul_(0.5)
    torch.cuda.synchronize()
    times = steps.read()
    assert times is not None and times.collective_wait_s > 10 * times.compute_s > 0

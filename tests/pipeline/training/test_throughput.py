"""Rates cover the training time since the last reading only."""

from __future__ import annotations

import math
import time

import pytest
import torch

from pipeline.config.schema import Config
from pipeline.training import throughput
from pipeline.training.throughput import MOST_ROWS, ThroughputMeter, layer_products
from tests.support.fake_device import FakeDevice

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    clock = FakeDevice()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "synchronize", clock.synchronize)
    return clock


def make_meter(
    clock: FakeDevice, tokens_per_step: int = 1000, flops_per_token: int = 1, ceiling_flops: float = 1.0
) -> ThroughputMeter:
    return ThroughputMeter(tokens_per_step, flops_per_token, ceiling_flops, CPU, clock)


def train(meter: ThroughputMeter, clock: FakeDevice, steps: int, step_s: float) -> None:
    for _ in range(steps):
        clock.now_s += step_s
        meter.count_step()


def test_rates(clock: FakeDevice) -> None:
    meter = make_meter(clock, flops_per_token=6_000, ceiling_flops=1e8)
    train(meter, clock, steps=4, step_s=0.5)
    rates = {"tokens_per_s": 2000.0, "step_ms": 500.0, "mfu": 0.12, "data_wait_share": 0.0}
    assert meter.read() == pytest.approx(rates)


def test_each_reading_starts_at_the_last_one(clock: FakeDevice) -> None:
    meter = make_meter(clock)
    train(meter, clock, steps=10, step_s=5.0)
    meter.read()
    train(meter, clock, steps=2, step_s=0.25)
    assert meter.read()["tokens_per_s"] == pytest.approx(4000.0)


def test_time_before_the_first_step_does_not_count(clock: FakeDevice) -> None:
    meter = make_meter(clock)
    clock.now_s += 100.0
    meter.restart()
    train(meter, clock, steps=1, step_s=2.0)
    assert meter.read()["step_ms"] == pytest.approx(2000.0)


def test_validation_and_checkpoints_do_not_count(clock: FakeDevice) -> None:
    meter = make_meter(clock)
    train(meter, clock, steps=1, step_s=1.0)
    with meter.paused():
        clock.now_s += 100.0
    train(meter, clock, steps=1, step_s=1.0)
    assert meter.read()["step_ms"] == pytest.approx(1000.0)


def test_the_clock_continues_after_an_error_in_a_pause(clock: FakeDevice) -> None:
    meter = make_meter(clock)
    with pytest.raises(OSError), meter.paused():
        clock.now_s += 100.0
        raise OSError
    train(meter, clock, steps=1, step_s=2.0)
    assert meter.read()["step_ms"] == pytest.approx(2000.0)


def test_the_device_finishes_its_work_before_the_clock_stops_and_before_it_continues(clock: FakeDevice) -> None:
    """The norms of layers are measured after each step that a GPU has not finished."""
    meter = make_meter(clock)
    for _ in range(2):
        clock.queued_s += 2.0  # the step
        meter.count_step()
        with meter.paused():
            clock.queued_s += 100.0
    clock.queued_s += 2.0
    meter.count_step()
    assert meter.read()["step_ms"] == pytest.approx(2000.0)
    assert meter.ceiling_flops == 1.0, "only a measurement of products raises the ceiling"


def test_a_restart_waits_for_earlier_work(clock: FakeDevice) -> None:
    meter = make_meter(clock)
    clock.queued_s += 100.0
    meter.restart()
    train(meter, clock, steps=1, step_s=2.0)
    assert meter.read()["step_ms"] == pytest.approx(2000.0)


def test_the_pause_of_a_failed_block_does_not_wait_for_the_device(clock: FakeDevice) -> None:
    """After an error on one rank, the collectives that it has queued never end."""
    meter = make_meter(clock)
    with pytest.raises(OSError), meter.paused():
        clock.queued_s = math.inf
        raise OSError


def test_a_wait_of_the_host_while_the_device_works_is_no_wait_for_data(clock: FakeDevice) -> None:
    meter = make_meter(clock)
    for _ in range(4):
        clock.queued_s += 3.0
        meter.count_step()
        with meter.waiting_for_data():
            clock.wait(4.0)
    assert meter.read()["data_wait_share"] == pytest.approx(0.25)


@pytest.mark.gpu
def test_the_work_of_a_gpu_counts_as_what_it_was_queued_for(gpu: torch.device) -> None:
    short, long = 20_000_000, 1_000_000_000  # clock cycles, about 10 ms and half a second
    meter = ThroughputMeter(1000, 1, 1.0, gpu)
    started_s = time.perf_counter()
    for _ in range(3):
        torch.cuda._sleep(short)
        meter.count_step()
        with meter.paused():
            torch.cuda._sleep(long)
    step_s = meter.read()["step_ms"] / 1e3
    assert 1e-3 < step_s < (time.perf_counter() - started_s) / 10


@pytest.mark.gpu
def test_a_wait_for_data_counts_only_while_a_gpu_has_no_work(gpu: torch.device) -> None:
    meter = ThroughputMeter(1000, 1, 1.0, gpu)
    shares = []
    for is_busy in (True, False):
        torch.cuda._sleep(2_000_000_000)  # clock cycles, about a second
        if not is_busy:
            torch.cuda.synchronize()
        with meter.waiting_for_data():
            time.sleep(0.1)
        meter.count_step()
        shares.append(meter.read()["data_wait_share"])
    assert shares[0] < shares[1]


def test_the_share_of_waiting_for_data(clock: FakeDevice) -> None:
    meter = make_meter(clock)
    for _ in range(4):
        with meter.waiting_for_data():
            clock.now_s += 0.1
        train(meter, clock, steps=1, step_s=0.3)
    with meter.paused():
        clock.now_s += 100.0
    assert meter.read()["data_wait_share"] == pytest.approx(0.25)
    train(meter, clock, steps=1, step_s=1.0)
    assert meter.read()["data_wait_share"] == 0.0
    with meter.waiting_for_data():
        clock.now_s += 100.0
    meter.restart()
    train(meter, clock, steps=1, step_s=1.0)
    assert meter.read()["data_wait_share"] == 0.0


def test_a_disturbed_measurement_of_the_ceiling_is_replaced_by_a_later_one(
    clock: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    meter = make_meter(clock, flops_per_token=6_000, ceiling_flops=1e8)
    with caplog.at_level("INFO"):
        meter.raise_ceiling(2e8)
        meter.raise_ceiling(5e7)  # this measurement is disturbed, too
    assert meter.ceiling_flops == 2e8
    assert [record.getMessage() for record in caplog.records] == [
        "ceiling   2e+08 FLOP/s, measured again (1e+08 before)"
    ]


def test_a_ceiling_below_the_speed_of_training_gives_no_mfu_until_a_higher_measurement(
    clock: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """Other programs have disturbed the measurement, so a share of it would say nothing, also in slower steps."""
    meter = make_meter(clock, flops_per_token=6_000, ceiling_flops=5e6)
    with caplog.at_level("INFO"):
        for step_s in (1.0, 2.0, 0.5):
            train(meter, clock, steps=1, step_s=step_s)
            assert meter.read()["mfu"] is None
        meter.raise_ceiling(1.1e7)  # disturbed, too
        train(meter, clock, steps=1, step_s=2.0)
        assert meter.read()["mfu"] is None
        meter.raise_ceiling(2e7)
        train(meter, clock, steps=1, step_s=2.0)
        assert meter.read()["mfu"] == pytest.approx(0.15)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("ceiling   too low: training reached 6e+06 FLOP/s, and 5e+06 were measured, ")
    assert [line.split()[1] for line in lines] == ["too", "1.1e+07", "2e+07"], "one line until the next measurement"


@pytest.mark.parametrize(("micro_batch_size", "rows"), [(1, 100), (10_000, MOST_ROWS)])
def test_the_measured_products_of_a_block_have_the_elements_of_its_matrices(micro_batch_size: int, rows: int) -> None:
    config = Config.model_validate({"data": {"seq_len": 100}, "batch": {"micro_batch_size": micro_batch_size}})
    products = layer_products(config)
    assert {m for m, _, _ in products} == {rows}
    assert sum(math.prod(shape) for shape in products) == rows * 12 * config.model.n_embd**2

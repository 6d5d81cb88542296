"""A profile covers the requested steps; without a request nothing is written."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerAction

from pipeline.run_folder.layout import PROFILE_FOLDER
from pipeline.training.step_profile import SETTLING_STEPS, TABLE_FILE, TRACE_FILE, StepProfile

CPU = torch.device("cpu")


def train(profile: StepProfile, steps: int, device: torch.device = CPU) -> None:
    a = torch.ones(8, 8, device=device)
    with profile.recording():
        for _ in range(steps):
            torch.mm(a, a)
            profile.count_step()


def test_trace_and_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline"):
        train(StepProfile(tmp_path, CPU, steps=2), SETTLING_STEPS + 4)
    trace = json.loads((tmp_path / PROFILE_FOLDER / TRACE_FILE).read_text())
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 2
    assert "aten::mm" in (tmp_path / PROFILE_FOLDER / TABLE_FILE).read_text()
    assert "aten::mm" in caplog.text


def test_a_profile_without_events_of_the_device_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(StepProfile(tmp_path, torch.device("cuda"), steps=2), SETTLING_STEPS + 4)  # no GPU, so no kernel
    assert "it has no time on cuda" in caplog.text
    assert (tmp_path / PROFILE_FOLDER / TRACE_FILE).is_file()


def test_only_kernels_count_on_a_gpu(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, torch.device("cuda"), steps=2)
    kernel = SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=False)
    operator = SimpleNamespace(device_type=DeviceType.CPU, is_user_annotation=False)
    annotation = SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=True)
    assert [profile._is_work(row) for row in (kernel, operator, annotation)] == [True, False, False]


def test_all_ranks_know_when_the_profiler_warms_up_and_writes(tmp_path: Path) -> None:
    profile, other = (StepProfile(tmp_path, CPU, steps=2, is_main=is_main) for is_main in (True, False))
    takes_long = []
    with profile.recording(), other.recording():
        assert profile._profiler and not other._profiler
        for step in range(1, SETTLING_STEPS + 6):
            before = profile._profiler.current_action
            profile.count_step()
            other.count_step()
            after = profile._profiler.current_action
            if ProfilerAction.NONE in (before, after) and before is not after:
                takes_long.append(step)
    assert len(takes_long) == 2
    for each in (profile, other):
        assert [step for step in range(1, 20) if each.takes_long_after(step)] == takes_long
    unused = StepProfile(tmp_path, CPU, steps=0)
    assert not any(unused.takes_long_after(step) for step in range(1, 20))


def test_a_run_that_ends_too_early_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(StepProfile(tmp_path, CPU, steps=2), SETTLING_STEPS - 1)
    assert "no profile was written" in caplog.text
    assert not (tmp_path / PROFILE_FOLDER).exists()


def test_nothing_is_profiled_by_default(tmp_path: Path) -> None:
    train(StepProfile(tmp_path, CPU, steps=0), SETTLING_STEPS + 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_kernels_of_a_gpu_are_profiled(tmp_path: Path, caplog: pytest.LogCaptureFixture, gpu: torch.device) -> None:
    with caplog.at_level(logging.INFO, "pipeline"):
        train(StepProfile(tmp_path, gpu, steps=2), SETTLING_STEPS + 4, gpu)
    trace = json.loads((tmp_path / PROFILE_FOLDER / TRACE_FILE).read_text())
    kernels = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    assert len(kernels) >= 2
    assert any(kernel[:40] in caplog.text for kernel in kernels), caplog.text
    assert "it has no time" not in caplog.text

"""The check of a GPU runs each step in its own process, keeps its time, records failures and continues later."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check.bounds import loss_bound
from benchmarks.gpu_check.page import render
from benchmarks.gpu_check.plan import Check
from benchmarks.gpu_check.readings import read_curve_of, read_tests
from benchmarks.gpu_check.steps import FAILED, PASSED, RESULTS_FILE, SKIPPED, Record, Runner, Stage, Step
from benchmarks.gpu_check.trace import busy_share, overlap_share, read_events, shares_of_time
from benchmarks.train_command import PeerCommand
from pipeline.run_folder.metrics import METRICS_FILE
from tests.support.runs import REPOSITORY, child_environment

ONE_GPU: dict[str, Any] = {
    "device_type": "cuda",
    "device": "NVIDIA H100",
    "devices": 1,
    "memory_gib": 79.1,
    "cores": 16,
    "capability": "9.0",
    "cuda": "13.0",
    "cudnn": 91501,
    "nccl": "2.28.9",
    "python": "3.12.3",
    "torch": "2.11.0",
    "packages": {"deepspeed": None, "transformers": "5.17.0", "pytest": "9"},
}


def python_step(name: str, code: str, *, limit_s: float = 60, usual_s: float = 0, **options: Any) -> Step:
    """Return a step that runs Python code, which knows its folder as ``folder``."""

    def read(folder: Path) -> dict[str, Any]:
        return dict(json.loads((folder / "result.json").read_text()))

    prelude = f"import json, sys, time, subprocess, pathlib; folder = pathlib.Path({name!r});"
    return Step(name, [sys.executable, "-c", prelude + code], read, limit_s, usual_s, **options)


def writes(figures: str) -> str:
    return f"(folder / 'result.json').write_text(json.dumps({figures}))"


def run_steps(folder: Path, *steps: Step, seconds: float = 60, **options: Any) -> Record:
    record = Record(folder)
    Runner(record, time.monotonic() + seconds, workers=2, **options).run([Stage("a", steps, alone=False)])
    return record


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class TestRunner:
    def test_a_failure_is_recorded_and_the_next_steps_run(self, tmp_path: Path) -> None:
        record = run_steps(
            tmp_path,
            python_step("crashes", "print('started'); sys.exit('no kernel image')"),
            python_step("finds", writes("{'x': 2, 'problem': 'differs'}")),
            python_step("says nothing", "pass"),
            python_step("cannot", "pass", skipped="one GPU"),
            python_step("works", writes("{'x': 1}")),
        )
        assert {name: outcome["status"] for name, outcome in record.outcomes.items()} == {
            "crashes": FAILED,
            "finds": FAILED,
            "says nothing": FAILED,
            "cannot": SKIPPED,
            "works": PASSED,
        }
        assert record.outcomes["crashes"]["problem"] == "exit status 1"
        assert record.outcomes["crashes"]["log"] == ["started", "no kernel image"]
        assert record.outcomes["finds"]["problem"] == "differs" and record.figures("finds")["x"] == 2
        assert "no result: FileNotFoundError" in record.outcomes["says nothing"]["problem"]
        assert json.loads((tmp_path / RESULTS_FILE).read_text()) == record.outcomes

    def test_a_step_that_hangs_is_stopped_with_its_children(self, tmp_path: Path) -> None:
        code = (
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True);"
            "(folder / 'pid').write_text(str(child.pid)); time.sleep(600)"
        )
        record = run_steps(tmp_path, python_step("hangs", code, limit_s=15))
        assert record.outcomes["hangs"]["problem"] == "still running after 15 s"
        child = int((tmp_path / "hangs" / "pid").read_text())
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE

    def test_a_call_ends_in_time_and_the_next_call_continues(self, tmp_path: Path) -> None:
        """Steps with a result do not run again, except a failed one on request."""
        count = "open('ran', 'a').write(folder.name + ' ');"
        steps = [
            python_step("done", count + writes("{}")),
            python_step("fails", count + "sys.exit(3)"),
            python_step("long", count + "time.sleep(0 if (folder.parent / 'quick').exists() else 600);" + writes("{}")),
            python_step("dear", count + writes("{}"), usual_s=100, limit_s=200),
        ]
        started = time.monotonic()
        first = run_steps(tmp_path, *steps, seconds=30)
        assert time.monotonic() - started < 60
        assert [first.status(step.name) for step in steps] == [PASSED, FAILED, None, None]
        (tmp_path / "quick").touch()
        second = run_steps(tmp_path, *steps, seconds=300)
        assert [second.status(step.name) for step in steps] == [PASSED, FAILED, PASSED, PASSED]
        assert sorted((tmp_path / "ran").read_text().split()) == ["dear", "done", "fails", "long", "long"]
        run_steps(tmp_path, *steps, seconds=300, repeat_failed=True)
        assert (tmp_path / "ran").read_text().split()[-1] == "fails"

    def test_a_step_runs_again_if_its_command_has_changed(self, tmp_path: Path) -> None:
        for value in (1, 2):
            record = run_steps(tmp_path, python_step("a", writes(f"{{'x': {value}}}")))
            assert record.figures("a")["x"] == value


def write_curve(run: Path, losses: list[float], log: str = "") -> Path:
    run.mkdir(parents=True)
    rows = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses, 1)]
    (run / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.parent / "log.txt").write_text(log)
    return run


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_curve_must_stay_within_the_bound(factor: float, tmp_path: Path) -> None:
    reference = write_curve(tmp_path / "reference" / "run", [5.0, 4.0])
    found = write_curve(tmp_path / "x" / "run", [5.0, 4.0 + factor * loss_bound("bf16")], "attention FLASH_ATTENTION\n")
    figures = read_curve_of(found, reference, "bf16")(tmp_path)
    assert figures["kernel"] == "FLASH_ATTENTION"
    assert ("problem" in figures) == (factor > 1)


def test_outcomes_of_tests(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    report = f"--junitxml={tmp_path / 'report.xml'}"
    pytest_command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        report,
        "test_x.py",
    ]
    subprocess.run(pytest_command, cwd=tmp_path, stdout=subprocess.DEVNULL, check=False)
    figures = read_tests(tmp_path)
    assert figures["tests"] == {"test_a": "passed", "test_b": "failed", "test_c": "skipped"}
    assert figures["problem"] == "failed: test_b"


def trace_of(tmp_path: Path, *rows: tuple[str, str, float, float]) -> Path:
    """Write a trace of (category, name, start, duration) in microseconds on one thread."""
    events = [{"ph": "X", "cat": c, "name": n, "ts": ts, "dur": dur, "tid": 1, "pid": 1} for c, n, ts, dur in rows]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}))
    return path


def test_the_time_of_a_gpu_is_divided_by_class(tmp_path: Path) -> None:
    """Kernels count, and operators on the host do not. Half of the communication is hidden."""
    events = read_events(
        trace_of(
            tmp_path,
            ("cpu_op", "aten::mm", 0, 500),
            ("kernel", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNN", 0, 30),
            ("kernel", "triton_tem_fused_mm_4", 30, 10),
            ("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 30, 20),
            ("kernel", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_f16_knob_3_64x64x64", 60, 10),
            ("kernel", "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", 70, 10),
            ("kernel", "triton_red_fused_native_layer_norm_5", 80, 10),
            ("kernel", "triton_poi_fused__to_copy_add_addmm_mul_sigmoid_3", 90, 5),
            ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 95, 5),
        )
    )
    shares = shares_of_time(events)
    assert shares == pytest.approx(
        {
            "communication": 0.2,
            "attention": 0.1,
            "optimizer": 0.1,
            "matrix products": 0.4,
            "copies": 0.05,
            "norm, elementwise, loss": 0.15,
            "other": 0.0,
        }
    )
    assert overlap_share(events) == pytest.approx(0.5)
    assert busy_share(events) == pytest.approx(0.9)


def test_operators_of_a_cpu_count_without_those_that_they_call(tmp_path: Path) -> None:
    events = read_events(
        trace_of(
            tmp_path,
            ("cpu_op", "aten::linear", 0, 100),
            ("cpu_op", "aten::addmm", 10, 20),
            ("cpu_op", "aten::baddbmm", 30, 40),
            ("cpu_op", "aten::copy_", 15, 10),
            ("cpu_op", "aten::add", 100, 100),
            ("user_annotation", "ProfilerStep#5", 0, 1000),
        )
    )
    shares = shares_of_time(events)
    assert shares["matrix products"] == pytest.approx(0.45)
    assert shares["copies"] == pytest.approx(0.05)
    assert shares["norm, elementwise, loss"] == pytest.approx(0.5)
    assert overlap_share(events) is None


class TestPlan:
    def test_names_are_unique_and_every_setting_is_there(self, tmp_path: Path) -> None:
        for devices in (1, 8):
            check = Check(tmp_path, {**ONE_GPU, "devices": devices}, (PeerCommand("mine", "run {data}"),))
            names = [step.name for stage in check.stages() for step in stage.steps]
            assert len(names) == len(set(names))
            assert {"curve zero3 amp_fp16 compiled", "resume fsdp compiled", "move zero2", "speed mine"} <= set(names)
        assert {"curve fsdp bf16 compiled x8", "profile zero1 x8", "speed mine x8", "ceilings last x8"} <= set(names)

    def test_what_a_machine_lacks_is_skipped(self, tmp_path: Path) -> None:
        stages = Check(tmp_path, ONE_GPU).stages()
        reasons = {step.name: step.skipped for stage in stages for step in stage.steps}
        assert reasons["curve zero1 fp32 eager"] == reasons["memory zero3"] == "deepspeed is not installed"
        assert reasons["speed ddp x2"] == "this machine has one GPU"
        assert reasons["curve ddp fp32 eager"] == reasons["speed transformers-loop"] == ""

    def test_gpt2_is_measured_on_a_gpu(self, tmp_path: Path) -> None:
        setting = Check(tmp_path, ONE_GPU).speed_setting()
        assert (setting.n_layer, setting.n_embd, setting.seq_len, setting.micro_batch_size) == (12, 768, 1024, 32)

    def test_a_rehearsal_has_longer_time_limits(self, tmp_path: Path) -> None:
        limits = [
            {step.name: step.limit_s for stage in Check(tmp_path, machine).stages() for step in stage.steps}
            for machine in ({**ONE_GPU, "devices": 2}, {**ONE_GPU, "devices": 2, "device_type": "cpu"})
        ]
        assert limits[1] == {name: 5 * limit_s for name, limit_s in limits[0].items()}

    def test_every_test_for_gpus_is_a_step(self, tmp_path: Path) -> None:
        names = [step.name for step in Check(tmp_path, ONE_GPU).gpu_tests()]
        assert {"tests pipeline.model.test_attention", "tests pipeline.distributed.test_world"} <= set(names)
        assert "tests pipeline.config.test_schema" not in names
        rehearsal = Check(tmp_path, {**ONE_GPU, "device_type": "cpu"}).gpu_tests()
        assert {step.skipped for step in rehearsal} == {"these tests need a GPU"}


def test_the_page_shows_every_status(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.add("curve ddp fp32 eager", {"status": PASSED, "figures": {"largest_difference": 3e-6}})
    record.add(
        "curve ddp fp32 compiled",
        {
            "status": FAILED,
            "problem": "the loss differs",
            "log": ["a line"],
            "command": "run it",
            "figures": {"largest_difference": 2e-3},
        },
    )
    record.add("curve zero1 fp32 eager", {"status": SKIPPED, "problem": "deepspeed is not installed"})
    speeds = {
        "bf16, batch 1": {"ours": 236.4, "transformers": 625.8},
        "bf16, batch 4": {"ours": 733, "transformers": 1e3},
    }
    record.add("generation", {"status": PASSED, "figures": speeds})
    page = render(Check(tmp_path, ONE_GPU), record, "python -m benchmarks.gpu_check")
    assert "| ours | 236 | 733 |\n| transformers | 626 | 1,000 |" in page
    assert "| ddp | 3.0e-06 / 2.0e-03 **failed** |" in page
    assert "| zero1 | skipped / not reached |" in page
    assert "### curve ddp fp32 compiled\n\nthe loss differs\n\n    run it\n\n    a line" in page
    assert "- deepspeed is not installed: curve zero1 fp32 eager" in page
    assert "The same command continues with these steps." in page
    assert "1 x NVIDIA H100 with 79.1 GiB" in page


def gpu_check(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", str(folder), *options]


def test_the_check_runs_on_a_cpu_and_continues_after_a_stop(tmp_path: Path) -> None:
    """A part of it: the data, the reference, a curve, and the comparison of inference."""
    names = ["data", "reference", "curve fsdp fp32 eager", "inference"]
    call = gpu_check(tmp_path, "--only", *names)
    stopped = subprocess.Popen(call, cwd=REPOSITORY, env=child_environment(), stdout=subprocess.PIPE, text=True)
    assert stopped.stdout
    for line in stopped.stdout:
        if line.startswith("reference ("):
            stopped.send_signal(signal.SIGTERM)
            break
    assert "stopped by SIGTERM; the same command continues" in stopped.communicate(timeout=120)[0]
    assert set(json.loads((tmp_path / RESULTS_FILE).read_text())) == {"machine", "data"}

    result = subprocess.run(call, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True, check=True)
    assert "data (" not in result.stdout, "it has a result"
    outcomes = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert {name: outcomes[name]["status"] for name in names} == dict.fromkeys(names, PASSED)
    assert outcomes["curve fsdp fp32 eager"]["figures"]["largest_difference"] <= loss_bound("fp32")
    assert outcomes["inference"]["figures"]["equal_completions"] == 3
    page = (tmp_path / "page.md").read_text()
    assert "a rehearsal without a GPU" in page and "| b: correctness | 2 | 0 | 0 |" in page


class Machine(Runner):
    """Records an outcome of the step that describes the machine, without running it."""

    def __init__(self, record: Record, outcome: dict[str, Any]) -> None:
        super().__init__(record, 0, workers=1)
        self.outcome = outcome

    def run_one(self, step: Step) -> None:
        self.record.add(step.name, self.outcome)


def test_results_of_another_machine_are_refused(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.add("machine", {"status": PASSED, "figures": ONE_GPU})
    cpu = Machine(record, {"status": PASSED, "figures": {**ONE_GPU, "device_type": "cpu"}})
    with pytest.raises(SystemExit, match=r"has results of another machine \(device_type cuda is now cpu"):
        command.find_machine("cpu", cpu)
    assert json.loads((tmp_path / RESULTS_FILE).read_text())["machine"]["figures"] == ONE_GPU


@pytest.mark.parametrize(
    ("log", "line"), [([], "still running after 120 s"), (["a", "b"], "still running after 120 s; b")]
)
def test_a_machine_that_cannot_be_described_is_one_line(log: list[str], line: str, tmp_path: Path) -> None:
    """A step that is stopped before it prints anything has an empty log."""
    slow = Machine(Record(tmp_path), {"status": FAILED, "problem": "still running after 120 s", "log": log})
    with pytest.raises(SystemExit, match=rf"^error: the machine cannot be described: {line}$"):
        command.find_machine("cuda", slow)


def test_the_command_line() -> None:
    arguments = command.parse_arguments(["--peer-command", "x=run {data}", "--only", "curve *", "speed ddp"])
    assert (arguments.minutes, arguments.device) == (9.0, "cuda")
    assert arguments.peer_command == [PeerCommand("x", "run {data}")]
    steps = [python_step(name, "") for name in ("curve ddp fp32 eager", "speed ddp", "speed fsdp")]
    (stage,) = command.chosen_stages([Stage("b", steps, alone=False)], arguments.only)
    assert [step.name for step in stage.steps] == ["curve ddp fp32 eager", "speed ddp"]

"""``launch/run.py`` leaves signals to the stage that runs, and exits with the status of this stage."""

from __future__ import annotations

import signal
import sys

import pytest

from launch import run
from launch.run import run_stage

ENDS_ON_SIGTERM = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(21))"
SIGNALS_THE_PARENT = (
    "import os, signal, sys, time; {handler}; os.kill(os.getppid(), {number}); time.sleep({seconds}); "
    "sys.exit({status})"
)


@pytest.mark.parametrize(("number", "seconds", "status"), [(signal.SIGINT, 0.5, 20), (signal.SIGTERM, 60, 21)])
def test_a_signal_waits_for_the_stage(number: signal.Signals, seconds: float, status: int) -> None:
    script = SIGNALS_THE_PARENT.format(handler=ENDS_ON_SIGTERM, number=int(number), seconds=seconds, status=20)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        run_stage("train", [sys.executable, "-c", script], "train.py", [])
    assert ended.value.code == status
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 0), (signal.SIGTERM, 60)])
def test_after_a_signal_no_stage_follows_even_if_the_stage_has_completed(
    number: signal.Signals, seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example, a signal in the last step of training comes too late to interrupt the training."""
    completes = "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))"
    script = SIGNALS_THE_PARENT.format(handler=completes, number=int(number), seconds=seconds, status=0)
    with pytest.raises(SystemExit) as ended:
        run_stage("train", [sys.executable, "-c", script], "train.py", [])
    assert ended.value.code == 128 + number
    expected = f"error: {number.name} received: stopped after train; run the same command again to continue\n"
    assert capsys.readouterr().err == expected


def test_several_processes_start_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    launchers: list[list[str]] = []
    monkeypatch.setattr(run, "run_stage", lambda stage, launcher, *_: launchers.append(launcher))
    run.train(["--config", "ddp"], processes=3)
    assert launchers[0][1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]


def test_a_stage_that_a_signal_killed(capsys: pytest.CaptureFixture[str]) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    with pytest.raises(SystemExit) as ended:
        run_stage("evaluate", [sys.executable, "-c", script], "evaluate.py", [])
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "error: evaluate: ended by SIGTERM\n"

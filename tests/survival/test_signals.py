"""A signal ends a run after the current step and a save; the same command continues it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.state import read_state
from pipeline.checkpoint.verification import find_damage
from pipeline.distributed.rendezvous import free_port
from pipeline.run_folder.metrics import read_metrics
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.live_run import LiveRun
from tests.support.runs import Curve, Sections, curve_of, train_run
from tests.survival.conftest import STUCK_TRAIN, assert_same_curve, break_rank


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_ends_the_run_after_a_save(
    number: signal.Signals, sections: Sections, tmp_path: Path, whole: Curve, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    break_rank(monkeypatch, 0, "step", f"gets {number.name}", after=2)
    result = train_run("ddp", folder, sections, script=STUCK_TRAIN)
    assert result.returncode == 128 + number
    assert "step  2/" in result.stdout.partition(f"{number.name} received: finishing the step, then saving")[0]
    assert result.stderr.startswith(f"{number.name} received: stopped after step ")
    assert "error" not in result.stdout + result.stderr and "Traceback" not in result.stderr
    (last,) = list_checkpoints(folder)
    assert find_damage(last) is None
    assert read_state(last)[0].step == max(row["step"] for row in read_metrics(folder))
    continued = curve_of("ddp", folder, sections)
    assert continued == whole, "on the same backend and world size, bit for bit"


def test_a_signal_to_one_rank_stops_all_after_the_same_step(sections: Sections, tmp_path: Path, whole: Curve) -> None:
    folder = tmp_path / "run"
    with LiveRun("fsdp", folder, sections, processes=2, hold_after=2) as run:
        run.wait_for_step(2)
        run.ranks()[1].send_signal(signal.SIGUSR1)
        run.release()
        assert run.wait() != 0
        assert run.output.count("SIGUSR1 received: stopped after step") == 1
        assert "exitcode: 138" in run.output.replace("exitcode  : 138", "exitcode: 138")
    assert find_damage(list_checkpoints(folder)[-1]) is None
    train_run("ddp", folder, sections)
    assert_same_curve(folder, whole)


def test_a_signal_stops_a_running_evaluation(sections: Sections, tmp_path: Path, whole_folder: Path) -> None:
    """One of two ranks gets the signal. Another backend repeats the evaluation and continues the run."""
    folder = tmp_path / "run"
    with LiveRun("zero3", folder, sections, processes=2, hold_after=5, hold_in="evaluation") as run:
        run.wait_until(lambda: run.output.count("waits in the evaluation") == 2)
        run.ranks()[0].send_signal(signal.SIGUSR1)
        run.wait_until(lambda: "SIGUSR1 received: finishing" in run.output)
        run.release()
        assert run.wait() != 0
        assert "the evaluation of step 5 was stopped; the next start repeats it" in run.output
        assert "SIGUSR1 received: stopped after step 5 of" in run.output
    (last,) = list_checkpoints(folder)[-1:]
    assert find_damage(last) is None and read_state(last)[0].step == 5
    assert 5 not in validation_losses(folder)
    train_run("ddp", folder, sections)
    assert validation_losses(folder) == pytest.approx(validation_losses(whole_folder), abs=LOSS_TOLERANCE["fp32"])


def validation_losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["val_loss"] for row in read_metrics(folder) if "val_loss" in row}


def test_a_signal_to_torchrun_reaches_the_ranks(sections: Sections, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with LiveRun("ddp", folder, sections, processes=2, hold_after=2) as run:
        run.wait_for_step(2)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() != 0
        assert "torchrun waits for the save" in run.output
        assert run.output.index("SIGTERM received: stopped after step") < run.output.index("Traceback")
    assert len(list_checkpoints(folder)) == 1


def test_ctrl_c_under_deepspeed(sections: Sections, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    with LiveRun("zero2", folder, sections, command=deepspeed, hold_after=2) as run:
        run.wait_for_step(2)
        ranks = run.ranks()
        os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
        run.wait()
        run.wait_until_gone(ranks)
        assert "the deepspeed launcher may end before the save" in run.output
        assert "SIGINT received: stopped after step" in run.output
    assert find_damage(list_checkpoints(folder)[-1]) is None

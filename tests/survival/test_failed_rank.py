"""A rank that fails or is stuck is named with the reason, although the other ranks wait in a collective."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.errors import LostRankError
from tests.support.runs import Sections, merged, train_run
from tests.survival.conftest import STUCK_TRAIN, break_rank

TIMEOUT_S = 4


def test_the_exception_of_one_rank_is_printed_and_passed_on(
    sections: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rank(monkeypatch, 1, "step", "raises")
    result = train_run("ddp", tmp_path / "run", sections, processes=2, script=STUCK_TRAIN)
    assert result.returncode in (1, LostRankError.exit_status)
    assert "[rank 1 on " in result.stderr
    message = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\nTo use less memory, lower batch.micro"
    assert message in result.stderr
    assert re.search(
        r"^error: lost rank 1 \(.*\), which failed: OutOfMemoryError: CUDA out of memory", result.stderr, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("config", "where", "how", "phase"),
    [
        ("ddp", "forward", "sleeps", "step 7, micro-batch 1 of "),
        ("fsdp", "data", "sleeps", "step 7, waiting for data "),
        ("zero3", "forward", "sleeps", "step 7, micro-batch 1 of "),
        ("fsdp", "forward", "loops", "step 7, micro-batch 1 of "),
        ("zero1", "gpu", "loops", "the log of step 6 "),
    ],
)
def test_a_rank_whose_main_thread_is_stuck_is_named(
    config: str, where: str, how: str, phase: str, sections: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under FSDP and ZeRO-3, the other rank waits inside the forward pass and has passed as many marks."""
    break_rank(monkeypatch, 1, where, how)
    output = train_stuck(config, sections, tmp_path, processes=2)
    check_stuck(output, 1, how, phase)
    records = tmp_path / "run" / "flight_recorder"
    assert re.search(rf"^\[rank 0\] waits in gloo:\w+ \d+ of .* \({records}/rank_0\)$", output, re.MULTILINE), output
    assert re.search(rf"^\[rank 1\] waits in no collective; .* \({records}/rank_1\)$", output, re.MULTILINE), output
    assert json.loads((tmp_path / "run" / "heartbeat.json").read_text())["state"] == "training"


def test_a_single_process_that_waits_for_its_gpu_for_ever_ends(
    sections: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver may be set to wait without using CPU time. By default, PyTorch waits in a loop, as above."""
    break_rank(monkeypatch, 0, "gpu", "sleeps")
    check_stuck(train_stuck("ddp", sections, tmp_path, processes=1), 0, "sleeps", "the log of step 6 ")


def train_stuck(config: str, sections: Sections, tmp_path: Path, processes: int) -> str:
    """Train with a short timeout, and return what the ranks have printed to standard error."""
    hurried = merged(sections, {"run": {"rank_timeout_s": TIMEOUT_S}})
    result = train_run(config, tmp_path / "run", hurried, processes, script=STUCK_TRAIN)
    assert result.returncode == LostRankError.exit_status
    return result.stderr


def check_stuck(output: str, rank: int, how: str, phase: str) -> None:
    delay, function = {
        "sleeps": (r"not moved for \d+ s", "sleep_for_ever"),
        "loops": (r"no progress in \d+ s of CPU time \(at most [0-9.e-]+ s before\)", "loop_for_ever"),
    }[how]
    assert re.search(rf"^error: .*rank {rank} \([^)]*\): {delay}, in {phase}", output, re.MULTILINE), output
    assert re.search(rf"in {function}\).*run the same command again", output), output
    assert "the main thread is stuck here" in output


def test_a_rank_that_aborts_because_another_one_is_lost_is_lost_too(
    sections: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's watchdog may abort the remaining ranks (SIGABRT) before they have named the lost rank."""
    break_rank(monkeypatch, 2, "forward", "is killed")
    monkeypatch.setenv("ABORTING_RANK", "1")
    batch = {"batch": {"tokens_per_step": 288}}  # three ranks
    result = train_run("ddp", tmp_path / "run", merged(sections, batch), processes=3, script=STUCK_TRAIN)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: lost rank 1 \(.*\), rank 2 \(.*\); run the same command again", line)

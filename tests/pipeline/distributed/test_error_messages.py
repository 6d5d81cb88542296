"""An error is one line that a person can read. ``tests/survival/test_failed_rank.py`` has errors among ranks."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch

from data_tools.errors import UserError
from pipeline.distributed.error_messages import prints_for_node, report
from pipeline.errors import LostRankError, MainRankError
from tests.support.runs import child_environment


def test_a_user_error_is_one_line_with_a_short_value_and_the_cure(capsys: pytest.CaptureFixture[str]) -> None:
    status = report(UserError(f"run.json:\n{'9' * 5000} is no key; remove it"))
    assert status == UserError.exit_status
    nines = "9" * 100
    assert capsys.readouterr().err == f"error: run.json: {nines}[...]{nines} is no key; remove it\n"


def test_an_error_keeps_its_status_on_a_closed_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Mock(write=Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    monkeypatch.setattr(sys, "stderr", stream)
    assert report(UserError("no such key")) == UserError.exit_status
    assert stream.write.called


def test_a_long_path_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/folder" * 60
    report(UserError(f"{path}: no such file"))
    assert capsys.readouterr().err == f"error: {path}: no such file\n"


def test_a_cpu_without_enough_memory_gets_advice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert report(caught.value) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("To use less memory, lower batch.micro_batch_size")


def test_another_rank_ends_without_a_line_when_the_launcher_stops_it() -> None:
    """Also if the run has a handler for SIGTERM. The signal is repeated, because the first one may come too early."""
    script = (
        "import signal; from data_tools.errors import UserError\n"
        "from pipeline.distributed.error_messages import report\n"
        "signal.signal(signal.SIGTERM, lambda *_: None); print('ready', flush=True)\n"
        "report(UserError('all ranks have this error'))"
    )
    environment = {**child_environment(), "RANK": "1", "WORLD_SIZE": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, text=True, **pipes) as rank:
        assert rank.stdout and rank.stderr
        assert rank.stdout.readline() == "ready\n"
        while rank.poll() is None:
            rank.terminate()
            time.sleep(0.02)
        assert rank.stderr.read() == ""
        assert rank.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("local_rank", "size", "prints"), [(7, 64, True), (7, 72, False), (0, 72, True), (1, 72, True)]
)
def test_with_many_ranks_two_per_node_print_what_all_would_print(
    local_rank: int, size: int, prints: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": 8 + local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, str(value))
    assert prints_for_node() == prints
    assert report(LostRankError("lost rank 3")) == LostRankError.exit_status
    assert capsys.readouterr().err == ("error: lost rank 3\n" if prints else "")
    assert report(MainRankError("rank 0 has failed", 2)) == 2  # this host is not that of rank 0
    assert ("error: rank 0 has failed" in capsys.readouterr().err) == (local_rank == 0)

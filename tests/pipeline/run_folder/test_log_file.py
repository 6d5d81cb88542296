"""The log file of a run has the lines of the terminal, of all starts and ranks, and the error that ended the run."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, MainRankError
from pipeline.run_folder.layout import LOG_FILE
from pipeline.run_folder.log_file import run_log
from tests.pipeline.conftest import largest_file

log = logging.getLogger("pipeline.some.module")


def lines_of(folder: Path) -> list[str]:
    """Return the lines without their dates."""
    lines = (folder / LOG_FILE).read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    return [line[20:] for line in lines]


def test_a_resumed_run_appends_and_other_ranks_have_a_prefix(tmp_path: Path) -> None:
    with run_log(0) as file:
        log.error("before the folder is open")
        file.open(tmp_path)
        log.warning("step 1")
    with run_log(1) as file:
        file.open(tmp_path)
        log.error("out of memory")
    log.error("after the run")
    expected = ["ERROR   before the folder is open", "WARNING step 1", "ERROR   [rank 1] out of memory"]
    assert lines_of(tmp_path) == expected


def test_a_run_that_did_not_start_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), run_log(0):
        log.error("a line")
        raise ConfigError("wrong")
    with run_log(1) as file:
        file.open(tmp_path)
    assert not (tmp_path / LOG_FILE).exists()


def test_the_error_that_ended_the_run_is_the_last_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), run_log(0) as file:
        file.open(tmp_path)
        raise ConfigError("one line")
    with pytest.raises(MainRankError), run_log(1) as file:
        file.open(tmp_path)
        raise MainRankError("one line", 2)
    assert lines_of(tmp_path) == ["ERROR   one line"]
    with pytest.raises(ZeroDivisionError), run_log(0) as file:
        file.open(tmp_path)
        _ = 1 / 0
    text = (tmp_path / LOG_FILE).read_text()
    assert "Traceback" in text and text.endswith("ZeroDivisionError: division by zero\n")


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path) -> None:
    with run_log(0) as file:
        file.open(tmp_path)
        with largest_file(0):
            log.error("lost")
        log.error("kept")
    assert lines_of(tmp_path)[-1] == "ERROR   kept"

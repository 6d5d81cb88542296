"""An error is one line that a person can read. ``tests/survival/test_failed_rank.py`` has errors among ranks."""

from __future__ import annotations

import pytest

from data_tools.errors import UserError
from pipeline.distributed.failure import report


def test_a_user_error_is_one_line_with_a_short_value_and_the_cure(capsys: pytest.CaptureFixture[str]) -> None:
    status = report(UserError(f"run.json:\n{'9' * 5000} is no key; remove it"))
    assert status == UserError.exit_status
    nines = "9" * 100
    assert capsys.readouterr().err == f"error: run.json: {nines}[...]{nines} is no key; remove it\n"


def test_a_long_path_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/folder" * 60
    report(UserError(f"{path}: no such file"))
    assert capsys.readouterr().err == f"error: {path}: no such file\n"

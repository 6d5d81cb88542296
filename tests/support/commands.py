"""Run a command of ``launch/`` in the process of a test, which saves the start of a new process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from launch.cli import run_command

Done = tuple[int, str, str]  # status, output, errors


def command_runner(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Return a function that runs the command of a module with the given arguments."""
    monkeypatch.setattr(module, "start_logging", lambda: None)  # would outlive the call

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [Path(str(module.__file__)).name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command(module.main)
        assert isinstance(ended.value.code, int)
        return (ended.value.code, *capsys.readouterr())

    return run

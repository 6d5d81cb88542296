"""Messages that name an installation give a command that works in any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import errors
from data_tools.errors import install_command, list_names
from tests.support.runs import REPOSITORY


def test_the_command_of_a_checkout_works_in_another_folder(tmp_path: Path) -> None:
    """Pip finds the project and its extra. Nothing is downloaded or installed."""
    command = install_command("plots").replace("python", sys.executable, 1)
    assert command.endswith(f"-c {REPOSITORY}/constraints.txt -e '{REPOSITORY}[plots]'")
    options = "--dry-run --no-index --no-deps --no-build-isolation --quiet"
    result = subprocess.run(f"{command} {options}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "does not provide the extra" not in result.stderr


def test_the_command_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "data_tools" / "errors.py"))
    assert install_command("plots") == "python -m pip install 'gpt2-pipeline[plots]'"
    assert install_command() == "python -m pip install gpt2-pipeline"


def test_names_from_a_file_are_shortened() -> None:
    assert list_names([]) == "none"
    assert list_names(["a", "x" * 41]) == f"a, {'x' * 40}..."
    assert list_names(["a\nb"]) == r"a\nb"
    assert list_names(range(22)).endswith(", 18, 19, and 2 more")

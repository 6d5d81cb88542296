"""``gpt2-pipeline`` and ``python -m launch``: every command, and what is not a command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from data_tools.errors import UserError
from launch.__main__ import COMMANDS, run_subcommand
from tests.support.runs import REPOSITORY

NO_COMMANDS = {"__init__", "__main__", "cli", "tokenize_progress"}

#: Packages that a command imports only after it has parsed its arguments.
SLOW_PACKAGES = {"datasets", "deepspeed", "gigatoken", "huggingface_hub", "matplotlib", "tensorboard", "torch"}
PRINT_HELP_AND_REFUSE_AN_OPTION = """
import contextlib, io, json, sys
from data_tools.errors import UserError
from launch.__main__ import COMMANDS, run_subcommand

imported = {}
for name in COMMANDS:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        run_subcommand([name, "--help"])
    with contextlib.suppress(UserError):
        run_subcommand([name, "--no-such-option"])
    imported[name] = sorted({module.partition(".")[0] for module in sys.modules})
print(json.dumps(imported))
"""


def test_every_script_is_a_command() -> None:
    scripts = {path.stem for path in (REPOSITORY / "launch").glob("*.py")} - NO_COMMANDS
    assert {module for module, _, _ in COMMANDS.values()} == scripts


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_its_own_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpt2-pipeline"])
    with pytest.raises(SystemExit) as exit_:
        run_subcommand([name, "--help"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0
    assert printed.startswith("usage: gpt2-pipeline ")
    example = "torchrun --standalone --nproc_per_node=2 -m launch" if name == "train" else f"gpt2-pipeline {name} "
    assert f"example:\n  {'gpt2-pipeline config init ' if name == 'init' else example}" in printed


def test_help_and_wrong_options_import_no_slow_package() -> None:
    arguments = [sys.executable, "-c", PRINT_HELP_AND_REFUSE_AN_OPTION]
    shown = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name, packages in json.loads(shown.stdout).items():
        assert "argparse" in packages
        assert not SLOW_PACKAGES & set(packages), name


def test_the_options_reach_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpt2-pipeline"])
    run_subcommand(["init", str(tmp_path / "my.json")])
    run_subcommand(["config", "show", "--config", str(tmp_path / "my.json"), "--set", "run.seed=7"])
    printed = capsys.readouterr().out
    assert re.search(r"run\.seed +7 +--set", printed)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run_subcommand(arguments)
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    run_subcommand(["--version"])
    assert capsys.readouterr().out == f"gpt2-pipeline {version('gpt2-pipeline')}\n"


def test_an_unknown_command_is_one_line() -> None:
    with pytest.raises(UserError, match="trian: no such command; there are quickstart, run, tokenize, train"):
        run_subcommand(["trian"])

"""Run commands on damaged inputs in this process, and check how each command ended."""

from __future__ import annotations

import hashlib
import io
import logging
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from launch.cli import run_command
from benchmarks.fuzz.damage import copy_folder, damage_folder
from data_tools.errors import UserError

_LONGEST_LINE = 2000
_LOGGED_PACKAGES = ("pipeline", "data_tools", "launch")


@dataclass(frozen=True)
class Command:
    """A command to run on each damaged input.

    Attributes:
        main: the command's function, which reads ``sys.argv``.
        line: the arguments. ``{source}`` stands for the damaged input, ``{out}`` for a path that does not exist, and
            ``{fixed}`` for a folder with files that are never damaged.
        continues_in_source: whether a failed command may change or add files in ``{source}``.
        check: checks the output. It is called with ``{out}`` after each success.
    """

    main: Callable[[], object]
    line: str
    continues_in_source: bool = False
    check: Callable[[Path], object] | None = None


@dataclass(frozen=True)
class Group:
    """Inputs of one kind and the commands that read them.

    Attributes:
        name: the name of the group on the command line.
        make: a function of two empty folders. It writes the undamaged input into the first folder, and files that are
            never damaged into the second folder.
        commands: the commands to run, one after the other.
        damage: damages the files of a folder and returns a description of the damage.
    """

    name: str
    make: Callable[[Path, Path], None]
    commands: tuple[Command, ...]
    damage: Callable[[Path, random.Random], str] = damage_folder


@dataclass(frozen=True)
class Trial:
    """The result of one command on one damaged input. ``problem`` is None if the command ended correctly."""

    group: str
    number: int
    damage: str
    line: str
    status: int
    problem: str | None
    message: str

    def __str__(self) -> str:
        verdict = f"\n    {self.problem}" if self.problem else ""
        return f"{self.group} {self.number} ({self.damage})\n    {self.line}\n    {self.message}{verdict}"


class Workbench:
    """The folders that the trials of a group use."""

    def __init__(self, group: Group, folder: Path, seed: int) -> None:
        """Write the undamaged input, and check that every command accepts it."""
        self._group = group
        self._seed = seed
        self._sound = folder / "sound"
        self._fixed = folder / "fixed"
        self._work = folder / "work"
        for path in (self._sound, self._fixed):
            path.mkdir(parents=True)
        group.make(self._sound, self._fixed)
        for command in group.commands:
            copy_folder(self._sound, self._work / "source")
            trial = self._run(command, number=-1, damage="nothing")
            if trial.status or trial.problem:
                raise AssertionError(f"the undamaged input must be accepted: {trial}")

    def try_number(self, number: int) -> Iterator[Trial]:
        """Run all commands of the group on the damaged input with this number."""
        for command in self._group.commands:
            copy_folder(self._sound, self._work / "source")
            stream = random.Random(f"{self._seed}/{self._group.name}/{number}")
            damage = self._group.damage(self._work / "source", stream)
            yield self._run(command, number, damage)

    def _run(self, command: Command, number: int, damage: str) -> Trial:
        out = self._work / "out"
        paths = {"source": self._work / "source", "out": out, "fixed": self._fixed}
        line = command.line.format(**paths)
        before = _contents_of(self._work)
        status, error_output, unexpected = call(command.main, line.split())
        message = (error_output.strip().splitlines() or ["succeeded"])[-1]
        problem = unexpected or _judge(status, error_output)
        if not problem and status and not command.continues_in_source:
            problem = _difference(before, _contents_of(self._work))
        if not problem and not status and command.check:
            try:
                command.check(out)
            except UserError as error:
                problem = f"what it wrote is wrong: {error}"
        shown = command.line.format(source="SOURCE", out="OUT", fixed="FIXED")
        for path in self._work.iterdir():
            if path != paths["source"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Trial(self._group.name, number, damage, f"{command.main.__module__} {shown}", status, problem, message)


def call(main: Callable[[], object], arguments: list[str]) -> tuple[int, str, str | None]:
    """Run a command in this process.

    Returns the exit status, the error output, and the traceback of an exception that ``run_command`` did not catch.
    """
    status, unexpected = 0, None
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors), mock.patch.object(sys, "argv", ["command", *arguments]):
        try:
            run_command(main)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            status, unexpected = 1, "".join(traceback.format_exception(error))
    for package in _LOGGED_PACKAGES:
        logging.getLogger(package).handlers.clear()
    return status, errors.getvalue(), unexpected


def _judge(status: int, error_output: str) -> str | None:
    """Return a description of the problem if a command ended in a wrong way, else None."""
    lines = error_output.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if status not in (0, UserError.exit_status):
        return f"status {status}: {error_output}"
    if len(errors) != bool(status) or (errors and lines[-1] != errors[0]):
        return f"status {status} with {len(errors)} error lines, and the last line is {lines[-1:]}"
    if errors and not errors[0].replace("\t", " ").isprintable():
        return "control characters in the error line"
    if errors and len(errors[0]) > _LONGEST_LINE:
        return f"an error line of {len(errors[0])} characters"
    return None


def _contents_of(folder: Path) -> dict[str, str]:
    """Return the hash of each file in a folder and its subfolders, by path. Subfolders have an empty hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def _difference(before: dict[str, str], after: dict[str, str]) -> str | None:
    left = sorted(name for name in before | after if before.get(name) != after.get(name))
    return f"the failed command left or changed {', '.join(left)}" if left else None

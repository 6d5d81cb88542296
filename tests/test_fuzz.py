"""A few damaged inputs of each kind: commands succeed or end with one error line. ``make fuzz`` tries thousands."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from benchmarks.fuzz.damage import damage_folder
from benchmarks.fuzz.groups import GROUPS
from benchmarks.fuzz.trial import Command, Group, Workbench
from data_tools.errors import DataError

INPUTS = 4
SLOW = ("run", "hf-model")  # groups whose commands train


@pytest.mark.parametrize("name", GROUPS)
def test_damaged_input_ends_with_success_or_one_error_line(name: str, tmp_path: Path) -> None:
    bench = Workbench(GROUPS[name], tmp_path, seed=1)
    trials = [trial for number in range(1 if name in SLOW else INPUTS) for trial in bench.try_number(number)]
    problems = [str(trial) for trial in trials if trial.problem]
    assert not problems, "\n".join(problems)


def test_the_same_seed_gives_the_same_damage(tmp_path: Path) -> None:
    def damaged(seed: int) -> list[bytes]:
        contents = []
        for number in range(20):
            (tmp_path / "file").write_bytes(b'{"a": [1, 2, 3]}\n' * 9)
            (tmp_path / "other").write_bytes(bytes(range(100)))
            damage_folder(tmp_path, random.Random(f"{seed}/{number}"))
            contents += [path.read_bytes() for path in sorted(tmp_path.iterdir()) if path.is_file()]
            for path in tmp_path.iterdir():
                path.unlink() if path.is_file() else path.rmdir()
        return contents

    assert damaged(0) == damaged(0) != damaged(1)


def ignore_damage(folder: Path, stream: random.Random) -> str:
    return "nothing"


def problem_of(folder: Path, main: object) -> str | None:
    """Return the problem of a command that accepts the undamaged input once and does something else afterwards."""
    calls = iter([False, True])

    def accept_then_fail() -> None:
        if next(calls):
            assert callable(main)
            main()

    def make(source: Path, fixed: Path) -> None:
        (source / "file").touch()

    bench = Workbench(Group("it", make, (Command(accept_then_fail, "{source} {out}"),), ignore_damage), folder, 0)
    (trial,) = bench.try_number(0)
    return trial.problem


def test_what_counts_as_a_problem(tmp_path: Path) -> None:
    def refuse(message: str) -> None:
        raise DataError(message)

    def leave_output() -> None:
        (tmp_path / "half" / "work" / "out").mkdir()
        raise DataError("too late")

    def print_control_characters() -> None:
        print("error: \x1b[31m", file=sys.stderr)
        raise SystemExit(2)

    assert problem_of(tmp_path / "fine", lambda: refuse("the file is damaged")) is None
    assert "ZeroDivisionError" in str(problem_of(tmp_path / "other", lambda: 1 / 0))
    assert problem_of(tmp_path / "escaped", lambda: refuse("\x1b[31m")) is None, "run_command escapes it"
    assert "control characters" in str(problem_of(tmp_path / "escape", print_control_characters))
    assert "an error line of" in str(problem_of(tmp_path / "long", lambda: refuse("word " * 2_000)))
    assert problem_of(tmp_path / "half", leave_output) == "the failed command left or changed out"

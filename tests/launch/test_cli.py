"""All commands parse repeated options alike, and survive a terminal without UTF-8 and a pipe without a reader."""

from __future__ import annotations

import argparse
import os
import pty
import signal
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from launch.cli import ArgumentParser, add_config_options, path_or_url
from data_tools.errors import UserError
from launch import doctor, evaluate, export, generate, plan, report, run, shards, train
from launch.tokenize_corpus import build_parser
from tests.support.runs import REPOSITORY, child_environment


def parser() -> ArgumentParser:
    made = ArgumentParser(description="", example="")
    add_config_options(made)
    made.add_argument("--tasks", nargs="+", default=["validation"])
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", action="store_true")
    return made


def test_a_crash_in_native_code_prints_where_it_happened() -> None:
    """SIGBUS is the signal for reading a mapped file that another process has cut."""
    code = """
        import os, resource, signal
        from launch.cli import run_command
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # writes no core file
        def read_a_cut_file():
            os.kill(os.getpid(), signal.SIGBUS)
        run_command(read_a_cut_file)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY, env=child_environment(), capture_output=True
    )
    assert done.returncode == -signal.SIGBUS
    assert b"Bus error" in done.stderr
    assert b"in read_a_cut_file" in done.stderr


def test_every_value_of_a_repeated_option_counts() -> None:
    line = "--config a.json b.json --config c.json --tasks x --tasks y --set k=1 --set l=2 m=3"
    parsed = parser().parse_args(line.split())
    assert (parsed.config, parsed.tasks, parsed.set) == (
        ["a.json", "b.json", "c.json"],
        ["x", "y"],
        ["k=1", "l=2", "m=3"],
    )


def test_a_parser_forgets_the_previous_command_line() -> None:
    used = parser()
    for _ in range(2):
        assert used.parse_args(["--config", "a.json", "--seed", "1"]).config == ["a.json"]
    assert used.parse_args(["--config", "a.json"]).tasks == ["validation"]


def test_a_single_value_given_twice_is_refused() -> None:
    for second in ("--seed 0", "--seed=3"):
        with pytest.raises(UserError, match="argument --seed: is given more than once; give it once"):
            parser().parse_args(["--config", "a", "--seed", "0", *second.split()])


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--learning_rate=1e-3"], "; config keys are given with --set, as in --set optimizer.learning_rate=1e-3 "),
        (["--max-steps", "60"], "as in --set schedule.max_steps=60 "),
        (["--run.out_dir", "my run"], "as in --set 'run.out_dir=my run' "),
        (["--lr"], "as in --set optimizer.learning_rate=VALUE "),
        (["--lr", "--nonsense"], "as in --set optimizer.learning_rate=VALUE "),
        (["--nonsense=1"], "unrecognized arguments: --nonsense=1 (see"),
    ],
)
def test_a_key_as_an_option_shows_how_to_set_it(options: list[str], advice: str) -> None:
    with pytest.raises(UserError) as refused:
        parser().parse_args(["--config", "a", *options])
    assert advice in str(refused.value)


def test_a_path_from_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    assert [str(path_or_url(text)) for text in ("~/a", "s3://a/~", "a/~")] == ["/home/user/a", "s3://a/~", "a/~"]


class Caught(Exception):
    """Ends a command once its parser is complete."""


@pytest.mark.parametrize("command", [train, evaluate, generate, export, plan, report, run, doctor, shards])
def test_every_command_has_this_parser(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command has an option that would drop a repeated value."""

    def check(self: argparse.ArgumentParser, *_arguments: Any, **_options: Any) -> None:
        assert isinstance(self, ArgumentParser)
        check_options(self)
        raise Caught

    monkeypatch.setattr(ArgumentParser, "parse_args", check)
    with pytest.raises(Caught):
        command.main()


def test_stage_1_has_this_parser() -> None:
    check_options(build_parser())


def check_options(checked: argparse.ArgumentParser) -> None:
    for action in checked._actions:
        assert not isinstance(action, argparse._StoreAction), action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for sub_command in action.choices.values():
                check_options(sub_command)


def start(code: str, stdout: int = subprocess.PIPE, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command whose body is ``code``."""
    script = (
        f"import logging\nfrom launch.cli import run_command, start_logging\ndef main():\n    {code}\nrun_command(main)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**child_environment(), **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    "code",
    ["[print(i) for i in range(10**5)]", "print('short')", "print('x' * 10**6)\n    raise SystemExit(1)"],
    ids=["while_printing", "at_the_end", "with_a_status"],
)
def test_a_pipe_without_a_reader_ends_a_command_quietly(code: str) -> None:
    process = start(code)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_the_progress_bar_of_a_rank_leaks_no_semaphore() -> None:
    process = start("start_logging(); from tqdm import tqdm; list(tqdm(range(3)))", RANK="0", WORLD_SIZE="2")
    _, errors = process.communicate()
    assert b"3/3" in errors
    assert b"leaked" not in errors


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_to_a_full_disk_is_one_line(unbuffered: str) -> None:
    code = "start_logging(); logging.getLogger('pipeline').info('lost'); print('short')"
    with open("/dev/full", "wb") as full:
        process = start(code, stdout=full.fileno(), PYTHONUNBUFFERED=unbuffered)
        _, errors = process.communicate()
    assert errors == b"error: No space left on device: the output or a temporary file\n"
    assert process.returncode == 2


def test_a_command_works_with_closed_standard_streams() -> None:
    code = "import sys; from launch.cli import run_command; run_command(lambda: print(sys.stdin.read()))"
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, code]
    ended = subprocess.run(command, cwd=REPOSITORY, env=child_environment(), stderr=subprocess.PIPE)
    assert (ended.stderr, ended.returncode) == (b"", 0)


def test_log_lines_without_a_reader_do_not_end_a_run() -> None:
    process = start(
        "start_logging(); logging.getLogger('pipeline').info('lost'); import sys; print('on', file=sys.stderr)"
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"on\n"
    process.wait()


def test_text_that_the_terminal_cannot_show_is_escaped() -> None:
    code = "start_logging(); logging.getLogger('pipeline').info('caf\\xe9'); print('\\u4f60')"
    process = start(code, PYTHONIOENCODING="ascii")
    out, errors = process.communicate()
    assert (errors, process.returncode) == (b"", 0)
    assert out == b"caf\\xe9\n\\u4f60\n"


@pytest.mark.parametrize(
    ("no_colour", "warning"),
    [("", b"\x1b[1;33mwarning: careful\x1b[0m\r\n"), ("1", b"warning: careful\r\n")],
    ids=["colour", "plain"],
)
def test_warnings_stand_out_on_a_terminal(no_colour: str, warning: bytes) -> None:
    terminal, inside = pty.openpty()
    code = "start_logging(); log = logging.getLogger('pipeline'); log.info('plain'); log.warning('careful')"
    process = start(code, inside, NO_COLOR=no_colour, TERM="xterm")
    _, errors = process.communicate()
    os.close(inside)
    assert (errors, process.returncode) == (b"", 0)
    assert os.read(terminal, 1000) == b"plain\r\n" + warning
    os.close(terminal)


def test_ctrl_c_during_the_imports_of_a_command_is_one_line() -> None:
    for code, status, stderr in (
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("import sys; sys.excepthook(ValueError, ValueError('other'), None)", 0, "ValueError: other\n"),
    ):
        command = [sys.executable, "-c", f"import launch; {code}"]
        ended = subprocess.run(command, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True)
        assert (ended.stderr, ended.returncode) == (stderr, status)

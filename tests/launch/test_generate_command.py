"""``launch/generate.py``: prompts, stops, streaming, and the prompt loop on a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest
import torch

import launch.generate
from launch.cli import run_command
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.config.schema import SampleConfig
from pipeline.generation import text_generator
from pipeline.model.packed_linear import InferenceLinear, can_pack
from tests.pipeline.interop.hugging_face.conftest import random_text_model, save_in_pieces, text_config
from tests.support.runs import REPOSITORY, child_environment

GREEDY = ["--temperature", "0", "--max-new-tokens", "12"]


#: The section ``sample`` of the run.
SAMPLE = {"prompt": "The run's own", "max_new_tokens": 7, "temperature": 0.5, "stop": ["never to be found"]}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose model has random weights."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    config = text_config(folder).model_copy(update={"sample": SampleConfig.model_validate(SAMPLE)})
    return save_in_pieces(random_text_model(text_config()), config, folder)


class Command:
    """Runs ``launch/generate.py`` in this process, which saves the seconds of a start."""

    def __init__(self, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.run_folder, self.monkeypatch, self.capsys = run_folder, monkeypatch, capsys
        monkeypatch.setattr(launch.generate, "start_logging", lambda: None)  # it would outlive the call

    def __call__(self, *arguments: str, typed: str = "", stdin: TextIO | None = None, status: int = 0) -> str:
        """Return what the command prints, or its error message if ``status`` is not 0."""
        command = ["generate.py", "--checkpoint", str(self.run_folder), "--device", "cpu", *arguments]
        self.monkeypatch.setattr(sys, "argv", command)
        self.monkeypatch.setattr(sys, "stdin", stdin or io.StringIO(typed))
        with pytest.raises(SystemExit) as ended:
            run_command(launch.generate.main)
        shown = self.capsys.readouterr()
        assert ended.value.code == status, shown.err
        return shown.err if status else shown.out


@pytest.fixture
def command(run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(run_folder, monkeypatch, capsys)


def test_several_prompts_are_completed_as_each_alone(command: Command) -> None:
    prompts = ["Hello", "Grüße from a longer text"]
    alone = [command(*GREEDY, "--prompt", prompt) for prompt in prompts]
    assert all(
        text.startswith(prompt) and len(text) > len(prompt) + 12 for text, prompt in zip(alone, prompts, strict=True)
    )
    together = command(*GREEDY, "--prompt", prompts[0], "--prompt", prompts[1])
    assert together == f"== 1/2\n{alone[0]}== 2/2\n{alone[1]}"


def test_an_empty_prompt_begins_a_new_text(command: Command, run_folder: Path) -> None:
    generator = text_generator.load_text_generator(run_folder, torch.device("cpu"))
    [text] = generator.complete_tokens([[END_OF_TEXT]], generator.sample.model_copy(update={"temperature": 0.0}), 0)
    assert text and command("--temperature", "0", "--prompt", "") == f"{text}\n"


def test_a_completion_ends_before_a_stop_text(command: Command) -> None:
    written = command(*GREEDY, "--prompt", "Hello").removeprefix("Hello").removesuffix("\n")
    stop = written[len(written) // 2 :][:3]
    stopped = command(*GREEDY, "--prompt", "Hello", "--stop", stop, "--stop", "never to be found")
    assert stopped == f"Hello{written[: written.index(stop)]}\n"


def test_a_small_top_p_is_greedy(command: Command) -> None:
    options = ["--prompt", "Hello", "--max-new-tokens", "12"]
    assert command(*options, "--top-p", "1e-9", "--seed", "5") == command(*options, "--temperature", "0")
    assert command(*options, "--seed", "5") != command(*options, "--seed", "6")


def test_the_defaults_are_the_runs_own(command: Command, run_folder: Path) -> None:
    options = ["--prompt", "The run's own", "--max-new-tokens", "7", "--temperature", "0.5"]
    shown = command()
    assert shown == command(*options)
    assert shown != command("--temperature", "2")
    assert command("--max-new-tokens", "9").startswith(shown.removesuffix("\n"))
    generator = text_generator.load_text_generator(run_folder, torch.device("cpu"))
    assert generator.sample == SampleConfig.model_validate(SAMPLE)
    stop = shown.removeprefix("The run's own")[3:6]
    assert command("--stop", stop) == f"{shown[: shown.index(stop)]}\n"


def test_chat_answers_each_message(command: Command) -> None:
    """The answers alone are shown. Messages of the command line and of a pipe are the same conversation."""
    shown = command(*GREEDY, "--chat", typed="Hello\nHow are you?\n")
    assert shown == command(*GREEDY, "--chat", "--prompt", "Hello", "--prompt", "How are you?")
    assert len(shown.splitlines()) >= 2 and "Hello" not in shown and "###" not in shown
    alone = command(*GREEDY, "--chat", "--prompt", "How are you?")
    assert not shown.endswith(alone), "the second answer depends on the first exchange"
    single = command(*GREEDY, "--chat", "instruction", "--prompt", "Hello", "--prompt", "How are you?")
    assert single.endswith(command(*GREEDY, "--chat", "instruction", "--prompt", "How are you?"))
    assert command(*GREEDY, "--chat", "--system", "Be brief.", "--prompt", "How are you?") != alone


def test_bf16(command: Command) -> None:
    assert command(*GREEDY, "--prompt", "Hello", "--precision", "bf16").startswith("Hello")


def test_on_a_cpu_the_weights_are_packed(run_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = text_generator.load_text_generator(run_folder, torch.device("cpu"))
    assert isinstance(generator.model.h[0].mlp.c_fc, InferenceLinear) == can_pack(torch.float32)
    packed = command(*GREEDY, "--prompt", "Hello")
    monkeypatch.setattr(text_generator, "pack_linear_layers", lambda model, dtype, rows: None)
    assert command(*GREEDY, "--prompt", "Hello") == packed


def test_an_error_is_one_line(command: Command) -> None:
    for arguments, expected in (
        (("--stop", ""), "--stop: must be at least one character"),
        (("--prompt", "a", "--interactive"), "--prompt: with --interactive prompts come from the terminal"),
        (("--prompt", "", "--chat"), "--prompt: a message of a chat must be at least one character"),
        (("--top-p", "0"), "--top-p: must be above 0 and at most 1"),
        (("--precision", "fp8"), "--precision: invalid choice: 'fp8'"),
        (("--chat", "poem"), "--chat: invalid choice: 'poem'"),
        (("--system", "a"), "--system: only a chat has a system message; add --chat"),
        (("--system", "a", "--chat", "instruction"), "--system: the template instruction has no system message"),
    ):
        error = command(*arguments, status=2)
        assert error.startswith("error: ") and expected in error and len(error.splitlines()) == 1, error


def test_interactive_completes_one_prompt_after_the_other(command: Command) -> None:
    """Without a terminal, no "> " is shown. Empty lines are ignored."""
    alone = [command(*GREEDY, "--prompt", prompt) for prompt in ("Hello", "Grüße")]
    assert command(*GREEDY, "--interactive", typed="Hello\n\nGrüße\n") == "".join(alone)
    assert command(*GREEDY, "--interactive") == ""


def test_piped_prompts_are_utf8(command: Command) -> None:
    """Also where the terminal's encoding is another one. A line of other bytes is one line of an error."""
    for encoding, mark in (("ascii", ""), ("utf-8", "\ufeff")):
        piped = io.TextIOWrapper(io.BytesIO(f"{mark}Grüße\n".encode()), encoding=encoding)
        assert command(*GREEDY, "--interactive", stdin=piped) == command(*GREEDY, "--prompt", "Grüße")
    broken = io.TextIOWrapper(io.BytesIO(b"Gr\xfc\xdfe\n"), encoding="utf-8", errors="surrogateescape")
    error = command(*GREEDY, "--chat", stdin=broken, status=2)
    assert error == "error: standard input is not UTF-8 text: invalid start byte at byte 2\n"


def test_the_seed_grows_with_each_prompt(command: Command) -> None:
    options = ["--max-new-tokens", "12", "--seed", "3"]
    assert command(*options, "--interactive", typed="Hello\nHello\n") == "".join(
        command("--max-new-tokens", "12", "--seed", seed, "--prompt", "Hello") for seed in ("3", "4")
    )


def test_the_completion_is_shown_while_it_is_generated(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    monkeypatch.setattr(launch.generate, "_show", pieces.append)
    command(*GREEDY, "--prompt", "Hello")
    tokens = load_tokenizer().encode("".join(pieces[1:-1]))
    assert len(pieces) >= 8 and len(tokens) >= 8
    assert pieces[0] == "Hello" and pieces[-1] == "\n"


#: Makes the terminal the controlling one of the new session, so that Ctrl-C reaches it, and starts a program. A
#: ``preexec_fn`` would do the same, but it needs a fork, which fails if the test process has mapped much memory.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def test_interactive_on_a_terminal(run_folder: Path) -> None:
    """A line can be edited. The command asks again after Ctrl-C, and Ctrl-C at an idle prompt leaves quietly."""
    controller, terminal = pty.openpty()
    options = ["--checkpoint", str(run_folder), "--device", "cpu", "--interactive", "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, sys.executable, str(REPOSITORY / "launch" / "generate.py"), *options],
        cwd=REPOSITORY,
        env=child_environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    try:
        read_until(controller, "> ")
        os.write(controller, b"ello\x01H\n")  # Ctrl-A goes to the beginning of the line
        read_until(controller, "\n", "Hello")  # the completion begins with the prompt
        os.write(controller, b"\x03")
        read_until(controller, "[interrupted]", "> ")
        assert interrupt_until_it_ends(process, controller) == 0
        rest = os.read(controller, 65536).decode(errors="replace")
        assert "error" not in rest and "Traceback" not in rest
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def interrupt_until_it_ends(process: subprocess.Popen[bytes], controller: int) -> int:
    """Press Ctrl-C until the process has ended, and return its status.

    Python loses a Ctrl-C that arrives after ``input`` has shown its prompt and before it waits for the keys: with
    readline about one in thirty that are sent at once (a user presses it again).
    """
    for _ in range(10):
        os.write(controller, b"\x03")
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=10)
    raise AssertionError("Ctrl-C at the prompt does not end the program")


def read_until(controller: int, *expected: str) -> str:
    """Return the output once it contains all of these texts in this order."""
    shown, deadline = "", time.monotonic() + 90
    while True:
        rest, complete = shown, True
        for text in expected:
            head, found, rest = rest.partition(text)
            complete = complete and bool(found)
        if complete:
            return shown
        assert time.monotonic() < deadline, shown
        if select.select([controller], [], [], 1)[0]:
            shown += os.read(controller, 65536).decode(errors="replace")

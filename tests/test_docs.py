"""What README and docs tell people to type exists, and runs.

Blocks under ``<!-- runnable -->`` are run as they stand, page by page, in a folder that looks like a checkout; stage 1
and training get options after their own that make them small. Whatever else is mentioned must exist: commands, options,
keys, files.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from pipeline.config.loading import valid_keys
from tests.support.rank_server import RankServer
from tests.support.runs import REPOSITORY, Sections, child_environment, overrides, run_ranks

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}

RUNNABLE = re.compile(r"<!-- runnable -->\n\n((?:    .*\n)+)")
COMMAND = re.compile(r"launch/(\w+)\.py([^`\n]*)")
LINK = re.compile(r"\]\(([^)#:]+)\)")
SETTING = re.compile(r"(?<![\w.])([a-z_]+(?:\.[a-z_0-9]+)+)=")

#: Makes any run of the docs last seconds.
SMALL: Sections = {
    "run": {"device": "cpu"},
    "model": {"n_layer": 1, "n_head": 1, "n_embd": 16, "context_length": 32},
    "batch": {"tokens_per_step": 128, "micro_batch_size": 2},
    "schedule": {"max_steps": 2, "warmup_steps": 1},
    "evaluation": {"max_batches": 2},
}
SHRUNK = {
    "train": ["--set", *overrides(SMALL)],
    "tokenize_corpus": ["--limit-documents", "60"],
}


@dataclass(frozen=True)
class Command:
    """A line of a runnable block."""

    processes: int
    script: str  # launch/train.py
    arguments: list[str]


def parse(line: str) -> Command:
    """A line as a shell and a launcher read it.

    Raises:
        ValueError: no command of this project under a launcher that is known here.
    """
    words = shlex.split(line, comments=True)
    at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    launcher, script, arguments = words[:at], words[at], words[at + 1 :]
    patterns = {r"python": 1, r"torchrun --standalone --nproc_per_node=(\d+)": 0, r"deepspeed --num_gpus (\d+)": 0}
    for pattern, processes in patterns.items():
        if matched := re.fullmatch(pattern, " ".join(launcher)):
            return Command(processes or int(matched[1]), script, arguments)
    raise ValueError(f"not runnable: {line}")


def runnable_commands(page: str) -> list[str]:
    return [line.strip() for block in RUNNABLE.findall(TEXTS[page]) for line in block.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RankServer]:
    """A folder that has what a checkout has, and the quickstart's data; what the commands write stays there."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "ds_configs", "README.md"):
        (folder / name).symlink_to(REPOSITORY / name)
    made = folder, RankServer(folder, child_environment())
    run(made, "python launch/tokenize_corpus.py --source python-stdlib --val-fraction 0.02 --out data/python-stdlib")
    return made


def run(checkout: tuple[Path, RankServer], line: str) -> None:
    folder, server = checkout
    command = parse(line)
    arguments = [*command.arguments, *SHRUNK.get(Path(command.script).stem, [])]
    with tempfile.TemporaryDirectory() as outputs:
        status = server.run(
            command.processes, folder / command.script, arguments, child_environment(), Path(outputs), timeout_s=120
        )
        said = "".join(path.read_text(errors="replace") for path in sorted(Path(outputs).iterdir()))
    assert status == 0, f"{line}\n{said}"


@pytest.fixture(scope="module")
def after_readme(checkout: tuple[Path, RankServer]) -> tuple[Path, RankServer]:
    """The same after the README's commands, which begin after ``make quickstart``; that is tested on its own."""
    run(checkout, "python launch/train.py --config ds_configs/ddp.json ds_configs/quickstart.json")
    for line in runnable_commands("README.md"):
        run(checkout, line)
    return checkout


def test_the_readme_runs(after_readme: tuple[Path, RankServer]) -> None:
    folder, _ = after_readme
    assert {"quickstart", "z1", "ddp"} <= {path.name for path in (folder / "runs").iterdir()}
    assert (folder / "report" / "report.html").is_file()


@pytest.mark.parametrize("page", [page for page in TEXTS if runnable_commands(page) and page != "README.md"])
def test_runnable_commands_run(page: str, after_readme: tuple[Path, RankServer]) -> None:
    folder, _ = after_readme
    for line in runnable_commands(page):
        run(after_readme, line)
    assert not (folder / "runs" / "gpt2").exists(), "each run of the docs has a folder of its own"


def test_the_marks_are_found() -> None:
    marks = sum(text.count("<!-- runnable -->") for text in TEXTS.values())
    assert marks == sum(len(RUNNABLE.findall(text)) for text in TEXTS.values()) >= 12
    with pytest.raises(ValueError, match="not runnable"):
        parse("srun python launch/train.py")


@cache
def options_of(command: str) -> set[str]:
    """All options of a command and of its sub-commands, from their --help."""
    script = REPOSITORY / "launch" / f"{command}.py"
    assert script.is_file(), f"there is no launch/{command}.py"
    said = help_of(script)
    subcommands = re.search(r"usage: \S+ \[-h\] ([a-z]+(?:\|[a-z]+)+) \.\.\.", said)
    for subcommand in subcommands[1].split("|") if subcommands else ():
        said += help_of(script, subcommand)
    return set(re.findall(r"--[a-z][a-z-_]*", said))


def help_of(script: Path, *subcommand: str) -> str:
    result = run_ranks(1, script, [*subcommand, "--help"])
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("page", TEXTS)
def test_commands_and_their_options_exist(page: str) -> None:
    for command, rest in COMMAND.findall(TEXTS[page]):
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-_]*", rest.partition(" # ")[0].partition(";")[0]))
        assert mentioned <= options_of(command), f"launch/{command}.py{rest}"


@pytest.mark.parametrize("page", TEXTS)
def test_settings_exist(page: str) -> None:
    """Every ``section.key=value``."""
    keys = set(valid_keys())
    sections = {key.partition(".")[0] for key in keys}
    for setting in SETTING.findall(TEXTS[page]):
        if setting.partition(".")[0] in sections and not setting.startswith("backend.deepspeed."):
            assert setting in keys


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_targets_exist(page: str) -> None:
    folder = REPOSITORY if page == "README.md" else REPOSITORY / "docs"
    for link in LINK.findall(TEXTS[page]):
        assert (folder / link).exists(), link
    for config in re.findall(r"ds_configs/\w+\.json", TEXTS[page]):
        assert (REPOSITORY / config).is_file() or config == "ds_configs/mylib.json", config
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", TEXTS[page], re.MULTILINE):
        assert target in targets, target

"""Check that what README, docs and CONTRIBUTING tell people to type, open or follow exists, and that it runs.

Blocks under ``<!-- runnable -->`` are run page by page, in a folder that looks like a checkout; options that make
stage 1 and training small are appended. Everything else that is mentioned must exist: commands, options, keys, files,
functions, links and their anchors. Each ``python`` block is run as a script.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import launch.train
from pipeline.config.keys import valid_keys
from pipeline.config.loading import load_config
from tests.support.runs import REPOSITORY, Sections, make_corpus, overrides, run_ranks


def read_page(name: str) -> str:
    """Return a page with commands that continue on the next line joined into one line."""
    return re.sub(r" *\\\n +", " ", (REPOSITORY / name).read_text(encoding="utf-8"))


#: What users read, and what contributors read: text by path within the repository.
USER_PAGES = ["README.md", *sorted(str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "docs").rglob("*.md"))]
TEXTS = {page: read_page(page) for page in USER_PAGES}
ALL_TEXTS = {**TEXTS, **{page: read_page(page) for page in ("CONTRIBUTING.md", "CHANGELOG.md")}}

PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNABLE = re.compile(r"<!-- runnable -->\n\n((?:    .*\n)+)")
COMMAND = re.compile(r"launch/(\w+)\.py([^`\n]*)")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
SETTING = re.compile(r"(?<![\w.])([a-z_]+(?:\.[a-z_0-9]+)+)=")
SOURCE_FILE = re.compile(
    r"(?<![\w/.-])((?:pipeline|data_tools|launch|tests|benchmarks|ds_configs)/[\w/.-]+\.(?:py|json|sbatch))"
)
QUALIFIED_NAME = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)*)`")

#: Files that the worked examples of CONTRIBUTING tell the reader to create.
NEW_FILES = {
    "pipeline/backends/mylib.py",
    "pipeline/backends/lion.py",
    "ds_configs/mylib.json",
    "data_tools/sources/mysource.py",
}

#: Overrides that make any run of the docs last seconds.
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


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Command:
    """One line of a runnable block."""

    processes: int
    script: str  # launch/train.py
    arguments: list[str]


def parse(line: str) -> Command:
    """Parse a line as a shell and a launcher do.

    Raises:
        ValueError: the launcher is not one of those used in the docs.
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
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the contents of a checkout and the quickstart's data; commands write into it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "ds_configs", "docs", "README.md"):
        (folder / name).symlink_to(REPOSITORY / name)
    run(folder, "python launch/tokenize_corpus.py --source python-stdlib --val-fraction 0.02 --out data/python-stdlib")
    return folder


#: The quickstart's own sizes are about 2,000 tokens per step and 250,000 tokens per run.
MOST_TOKENS_PER_STEP, MOST_TOKENS = 10_000, 1_000_000


def check_size(checkout: Path, arguments: list[str]) -> None:
    """Check that a training command sets a small batch and a short schedule itself, before it is shrunk."""
    with chdir(checkout):
        given = launch.train.build_parser().parse_args(arguments)
        config = load_config(given.config, given.set, given.deepspeed)
    assert config.batch.tokens_per_step <= MOST_TOKENS_PER_STEP
    assert config.batch.tokens_per_step * config.schedule.max_steps <= MOST_TOKENS


def run(checkout: Path, line: str) -> None:
    command = parse(line)
    if command.script == "launch/train.py":
        check_size(checkout, command.arguments)
    arguments = [*command.arguments, *SHRUNK.get(Path(command.script).stem, [])]
    result = run_ranks(command.processes, checkout / command.script, arguments, timeout_s=120, folder=checkout)
    assert result.returncode == 0, f"{line}\n{result.stderr}\n{result.stdout}"


@pytest.fixture(scope="module")
def after_readme(checkout: Path) -> Path:
    """Run the README's commands, which follow ``make quickstart`` (tested on its own), and return the same folder."""
    run(checkout, "python launch/train.py --config ds_configs/ddp.json ds_configs/quickstart.json")
    for line in runnable_commands("README.md"):
        run(checkout, line)
    return checkout


def test_the_readme_runs(after_readme: Path) -> None:
    assert {"quickstart", "z1", "ddp"} <= {path.name for path in (after_readme / "runs").iterdir()}
    assert (after_readme / "report" / "report.html").is_file()


@pytest.mark.parametrize("page", [page for page in TEXTS if runnable_commands(page) and page != "README.md"])
def test_runnable_commands_run(page: str, after_readme: Path) -> None:
    for line in runnable_commands(page):
        run(after_readme, line)
    assert not (after_readme / "runs" / "gpt2").exists(), "each run of the docs names its own folder"


def test_the_marks_are_found() -> None:
    marks = sum(text.count("<!-- runnable -->") for text in TEXTS.values())
    assert marks == sum(len(RUNNABLE.findall(text)) for text in TEXTS.values()) >= 12
    with pytest.raises(ValueError, match="not runnable"):
        parse("srun python launch/train.py")


@pytest.fixture(scope="module")
def small_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the dataset, the run and the export that the Python examples read, and with texts."""
    folder = tmp_path_factory.mktemp("small_quickstart")
    make_corpus(folder / "data" / "python-stdlib")
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text("One short book.\n")
    for script, arguments in (
        ("train", ["--config", "ddp", "quickstart", "--set", *overrides(SMALL)]),
        ("export", ["--checkpoint", "runs/quickstart", "--out", "exported/quickstart"]),
    ):
        result = run_ranks(1, REPOSITORY / "launch" / f"{script}.py", arguments, timeout_s=120, folder=folder)
        assert result.returncode == 0, result.stderr
    return folder


PYTHON_PAGES = {page: blocks for page, text in TEXTS.items() if (blocks := PYTHON_BLOCK.findall(text))}


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_examples_run(page: str, small_quickstart: Path) -> None:
    for block in PYTHON_PAGES[page]:
        script = small_quickstart / "example.py"
        script.write_text(block)
        result = run_ranks(1, script, [], timeout_s=120, folder=small_quickstart)
        assert result.returncode == 0, f"{block}\n{result.stderr}"


def test_the_python_examples_are_found() -> None:
    assert {"docs/api.md", "docs/data.md", "docs/huggingface.md"} <= PYTHON_PAGES.keys()
    assert sum(map(len, PYTHON_PAGES.values())) == sum(text.count("```python") for text in TEXTS.values())


def test_a_training_command_without_a_batch_or_a_schedule_is_found(tmp_path: Path) -> None:
    check_size(tmp_path, ["--config", "ddp", "quickstart"])
    for arguments in (["ddp"], ["ddp", "--set", "batch.tokens_per_step=2048", "batch.micro_batch_size=2"]):
        with pytest.raises(AssertionError):
            check_size(tmp_path, ["--config", *arguments])


@cache
def options_of(command: str) -> set[str]:
    """Return all options of a command and of its sub-commands, read from their --help."""
    script = REPOSITORY / "launch" / f"{command}.py"
    assert script.is_file(), f"there is no launch/{command}.py"
    text = help_of(script)
    subcommands = re.search(r"usage: \S+ \[-h\] ([a-z]+(?:\|[a-z]+)+) \.\.\.", text)
    for subcommand in subcommands[1].split("|") if subcommands else ():
        text += help_of(script, subcommand)
    return set(re.findall(r"--[a-z][a-z-_]*", text))


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
    """Check every ``section.key=value``."""
    keys = set(valid_keys())
    sections = {key.partition(".")[0] for key in keys}
    for setting in SETTING.findall(TEXTS[page]):
        if setting.partition(".")[0] in sections and not setting.startswith("backend.deepspeed."):
            assert setting in keys


@pytest.mark.parametrize("page", TEXTS)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", TEXTS[page], re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("page", [page for page in ALL_TEXTS if page != "CHANGELOG.md"])  # which names former files
def test_files_exist(page: str) -> None:
    for name in SOURCE_FILE.findall(ALL_TEXTS[page]):
        assert name in NEW_FILES or (REPOSITORY / name).is_file(), name


@pytest.mark.parametrize("page", ALL_TEXTS)
def test_links_resolve(page: str) -> None:
    """Relative links lead to a file, their anchors to a heading, and a link ``[`Name`](file.py)`` to a definition."""
    broken = []
    for text, target in LINK.findall(ALL_TEXTS[page]):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        names = QUALIFIED_NAME.findall(text) if file.suffix == ".py" else []
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(target)
        elif names and (missing := set(names) - definitions_of(file)):
            broken.append(f"{target} does not define {', '.join(missing)}")
    assert broken == []


@cache
def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def definitions_of(file: Path) -> set[str]:
    """Return the functions, classes, methods and variables that a source file defines, as ``Class.method``."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return found


def test_prose_fits_120_columns() -> None:
    for page, text in ((page, (REPOSITORY / page).read_text(encoding="utf-8")) for page in ALL_TEXTS):
        for number, line in enumerate(text.splitlines(), 1):
            is_free = line.startswith("|") or len(line.split()) == 1
            assert len(line) <= 120 or is_free, f"{page}:{number}"


def test_nested_lists_are_indented_by_four_spaces() -> None:
    """With fewer spaces, the site shows a nested list as one list with its parent."""
    for page, text in ALL_TEXTS.items():
        outside_fences = "".join(text.split("```")[::2])
        assert not re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*", outside_fences, re.MULTILINE), page

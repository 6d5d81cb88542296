"""``gpt2-pipeline completion``: what bash proposes, and scripts for the other shells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import COMMANDS
from launch.completion import SHELLS, completion_script

#: Words on the command line, the last of which is incomplete -> some of the words that bash proposes.
CASES = [
    ([""], ["quickstart", "train", "completion"]),
    (["tr"], ["train"]),
    (["train", "--conf"], ["--config"]),
    (["train", "--config", "zero2"], ["zero2", "zero2_offload"]),
    (["train", "--config", "ddp", "my"], ["my_run.json"]),
    (["train", "--config", "ddp", "--set", "schedule.max"], ["schedule.max_steps="]),
    (["train", "--config", "ddp", "--set", "model.preset=gpt2", "run.see"], ["run.seed="]),
    (["quickstart", "--set", "run.see"], ["run.seed="]),
    (["checkpoint", ""], ["inspect", "verify", "prune", "convert", "average"]),
    (["checkpoint", "prune", "ru"], ["runs"]),
    (["checkpoint", "prune", "runs", "--"], ["--keep", "--dry-run"]),
    (["export", "--dtype", ""], ["float32", "bfloat16"]),
    (["init", "my"], ["my_run.json"]),
    (["completion", ""], ["bash", "fish", "zsh"]),
]


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    return {shell: completion_script(shell) for shell in SHELLS}


def test_bash_completes_commands_options_files_and_keys(scripts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "my_run.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    calls = [
        f"COMP_WORDS=(gpt2-pipeline {' '.join(map(json.dumps, words))}); COMP_CWORD={len(words)}; _gpt2_pipeline; "
        'echo "${COMPREPLY[*]}"'
        for words, _ in CASES
    ]
    compopt = 'compopt() { echo "compopt $*" >&2; }'  # outside of a completion, bash refuses compopt
    bash = subprocess.run(
        ["bash"],
        input="\n".join([scripts["bash"], compopt, *calls]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    proposals = bash.stdout.splitlines()
    assert len(proposals) == len(CASES)
    for (words, expected), proposed in zip(CASES, proposals, strict=True):
        assert set(expected) <= set(proposed.split()), words
    assert bash.stderr.count("compopt -o nospace") == sum(expected[0].endswith("=") for _, expected in CASES)


def test_sections_and_elements_of_lists_are_not_keys(scripts: dict[str, str]) -> None:
    assert " schedule=" not in scripts["bash"]
    assert "*.weight=" not in scripts["bash"]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_script_has_all_commands(shell: str, scripts: dict[str, str]) -> None:
    for name in COMMANDS:
        assert name in scripts[shell]


def test_other_commands_do_not_import_the_library() -> None:
    code = "import sys, launch.__main__, launch.cli, launch.train; sys.exit('shtab' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

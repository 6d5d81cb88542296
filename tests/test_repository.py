"""Files for people and services outside the program agree with each other: versions, Python versions, make targets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runs import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
SETUP = (REPOSITORY / "setup.py").read_text()


@pytest.mark.parametrize("index", ["", "https://download.pytorch.org/whl/cpu"])
def test_make_announces_the_size_of_the_installation(index: str, tmp_path: Path) -> None:
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(str(shutil.which("true")))  # installs nothing
    environment = {"PATH": os.environ["PATH"], "PIP_EXTRA_INDEX_URL": index}
    shown = subprocess.run(
        ["make", ".venv/run"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("installing the packages in .venv")
    assert ("export PIP_EXTRA_INDEX_URL=https://download" in shown.stdout) == (not index)


def matrices(workflow: Path) -> list[list[str]]:
    jobs: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    return [job["strategy"]["matrix"]["python"] for job in jobs.values() if "strategy" in job]


def test_the_workflows_test_every_python_of_the_classifiers() -> None:
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', SETUP)
    tested = [matrix for workflow in WORKFLOWS for matrix in matrices(workflow)]
    assert promised and tested == [promised, promised], "tests.yml and wheels.yml"


@pytest.mark.parametrize("path", [*WORKFLOWS, REPOSITORY / ".devcontainer" / "devcontainer.json"], ids=lambda p: p.name)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z./-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    used = re.findall(r"\bmake ([a-z./-]+)", path.read_text())
    assert set(used) <= targets


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert f'version="{citation["version"]}"' in SETUP


def test_the_image_gets_every_folder_that_the_wheel_needs() -> None:
    """``.dockerignore`` leaves out everything that it does not name."""
    named = set(re.findall(r"^!([\w./]+?)/?$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE))
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages | {"ds_configs", "setup.py", "pyproject.toml", "README.md", "constraints.txt"} <= named

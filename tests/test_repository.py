"""Files for people and services outside the program agree with each other: versions, Python versions, make targets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runs import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
SETUP = (REPOSITORY / "setup.py").read_text()


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

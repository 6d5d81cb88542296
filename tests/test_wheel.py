"""The wheel: built, checked, and installed into an environment of its own, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from launch.quickstart import FEWEST_STEPS
from tests.support.runs import REPOSITORY, TINY_RUN, overrides

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "ds_configs", "data_tools", "pipeline", "launch")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ``bin`` folder of an environment with the wheel, which finds all other packages in this one.

    In that environment, DeepSpeed cannot be imported.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source, dist, environment = folder / "source", folder / "dist", folder / "environment"
    source.mkdir()
    for name in SOURCES:
        path = REPOSITORY / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / name)
    python = sys.executable
    subprocess.run([python, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source], check=True)
    (wheel,) = dist.glob("*.whl")
    subprocess.run([python, "-m", "twine", "check", "--strict", wheel], check=True)

    venv.create(environment, symlinks=True)
    target = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "--python", target, "install", "--quiet", "--no-deps", wheel], check=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (packages / "deepspeed.py").write_text("raise ImportError('DeepSpeed is not installed here')\n")
    return environment / "bin"


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in a folder, without this checkout on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [installed / arguments[0], *arguments[1:]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_modules_are_those_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, "python", "-c", "import launch.train; print(launch.train.__file__)")
    assert Path(shown.stdout.strip()).is_relative_to(installed.parent)


def test_shipped_configs_are_found_by_name(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, "gpt2-pipeline", "config", "show", "--config", "zero1", "quickstart")
    assert shown.returncode == 0, shown.stderr
    assert "pipeline/config/shipped/zero1.json" in shown.stdout
    assert "pipeline/config/shipped/quickstart.json" in shown.stdout


def test_the_quickstart_runs_in_an_empty_folder_without_deepspeed(installed: Path, tmp_path: Path) -> None:
    small = {key: value for key, value in TINY_RUN.items() if key != "batch"}
    settings = [*overrides(small), "batch.tokens_per_step=96", "batch.micro_batch_size=2"]
    settings += ["schedule.warmup_steps=1", "tokenize.limit_documents=60", "sample.max_new_tokens=5"]
    finished = run(installed, tmp_path, "gpt2-pipeline", "quickstart", "--minutes", "0.01", "--set", *settings)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{FEWEST_STEPS} steps, " in finished.stdout and "  step  validation loss\n" in finished.stdout
    assert "gpt2-pipeline generate --checkpoint runs/quickstart --prompt 'import '" in finished.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "runs"]

    zero1 = ["--set", *settings, "run.out_dir=runs/zero1"]
    refused = run(installed, tmp_path, "gpt2-pipeline", "train", "--config", "zero1", "quickstart", *zero1)
    error = refused.stderr.splitlines()[-1]
    assert refused.returncode == 2
    assert error.startswith("error: backend.name: deepspeed cannot be imported (DeepSpeed is not installed here)")


def test_a_launcher_finds_the_module_from_any_folder(installed: Path, tmp_path: Path) -> None:
    command = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "launch.train"]
    shown = run(installed, tmp_path, *command, "--help")
    assert shown.returncode == 0 and "Stage 2: train a run" in shown.stdout

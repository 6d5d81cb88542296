"""The commands from end to end, as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import list_checkpoints
from pipeline.distributed.rendezvous import free_port
from pipeline.run_folder.metrics import read_metrics
from tests.support.runs import (
    CONFIGS,
    REPOSITORY,
    TINY_RUN,
    TRAIN,
    child_environment,
    merged,
    overrides,
    read_curve,
    run_ranks,
    train_run,
)

LAUNCH = REPOSITORY / "launch"


def tiny_run(corpus: Path, run_folder: Path, steps: int = 4) -> list[str]:
    sections = merged(
        TINY_RUN,
        {"data": {"path": str(corpus)}, "schedule": {"max_steps": steps, "warmup_steps": 2}},
        {"run": {"out_dir": str(run_folder)}},
    )
    return ["--set", *overrides(sections)]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a few steps. Returns the run folder."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    result = run_ranks(1, TRAIN, ["--config", str(CONFIGS / "ddp.json"), *tiny_run(corpus, folder)])
    assert result.returncode == 0, result.stderr
    return folder


def test_the_deepspeed_launcher(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """``deepspeed --num_gpus 2 launch/train.py`` works without a GPU and gives the same curve as one process."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    arguments = ["--config", str(CONFIGS / "zero1.json"), *tiny_run(corpus, tmp_path / "run")]
    result = subprocess.run(
        [*launcher, str(TRAIN), *arguments],
        cwd=REPOSITORY,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "world size 2" in result.stdout
    assert read_curve(tmp_path / "run").largest_loss_difference(read_curve(trained)) <= 5e-6


def test_the_resolved_config_is_a_config(trained: Path, tmp_path: Path) -> None:
    """A run with the ``config.json`` of another run has the same curve."""
    result = run_ranks(1, TRAIN, ["--config", str(trained / "config.json"), "--set", f"run.out_dir={tmp_path}"])
    assert result.returncode == 0, result.stderr
    assert read_curve(tmp_path) == read_curve(trained)


def test_evaluation_does_not_depend_on_ranks(trained: Path) -> None:
    results = []
    for processes in (1, 2):
        result = run_ranks(processes, LAUNCH / "evaluate.py", ["--checkpoint", str(trained), "--tasks", "validation"])
        assert result.returncode == 0, result.stderr
        assert "bits_per_byte" in result.stdout
        results.append(json.loads((trained / "evaluation" / "validation.json").read_text()))
    assert results[0]["target_tokens"] == results[1]["target_tokens"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-6)
    assert results[0]["top5_accuracy"] == results[1]["top5_accuracy"]


def test_generate_repeats_itself(trained: Path) -> None:
    command = ["--checkpoint", str(trained), "--prompt", "import os", "--max-new-tokens", "8", "--seed", "3"]
    first, second = (run_ranks(1, LAUNCH / "generate.py", command) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("import os")
    assert first.stdout == second.stdout
    assert len(first.stdout) > len("import os\n")


def test_all_stages_interrupted_continued_and_skipped(tmp_path: Path) -> None:
    """``launch/run.py`` resumes when it is killed in training and started again. A third start skips all stages."""
    sections = merged(
        TINY_RUN,
        {
            "tokenize": {"source": "python-stdlib", "limit_documents": 60, "val_fraction": 0.05, "workers": 1},
            "data": {"path": str(tmp_path / "data")},
            "run": {"out_dir": str(tmp_path / "run")},
            "schedule": {"max_steps": 40},
            "checkpoint": {"every_steps": 4},
            "sample": {"max_new_tokens": 5},
        },
    )
    command = [sys.executable, str(LAUNCH / "run.py"), "--config", str(CONFIGS / "ddp.json")]
    command += ["--set", *overrides(sections)]

    kill_in_training(command, tmp_path / "run")
    saved = len(list_checkpoints(tmp_path / "run"))
    assert saved > 0

    continued = run(command)
    assert continued.returncode == 0, continued.stdout + continued.stderr
    assert "already complete" in continued.stdout
    assert "continues" in continued.stdout
    assert "bits_per_byte" in continued.stdout
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 41))

    repeated = run(command)
    assert repeated.returncode == 0
    assert "nothing to train" in repeated.stdout
    assert "evaluate: done before" in repeated.stdout


def kill_in_training(command: list[str], run_folder: Path) -> None:
    """Start a command in its own process group, and kill the whole group after the first checkpoint."""
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=child_environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not list_checkpoints(run_folder):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True, timeout=300)


def test_dtypes_optimizer_and_batch_are_logged(corpus: Path, tmp_path: Path) -> None:
    """A run logs at its start which dtypes, optimizer and batch it uses."""
    bf16 = {"run": {"precision": "bf16"}}
    result = train_run(
        "zero2", tmp_path, merged(TINY_RUN, {"data": {"path": str(corpus)}, "schedule": {"max_steps": 5}}, bf16), 1
    )
    assert "master weights float32, compute weights bfloat16, gradient accumulation float32" in result.stdout
    assert "ZeRO-2 with fused AdamW" in result.stdout
    assert "384 tokens per step = 2 sequences x 48 tokens x 4 micro-steps x 1 rank" in result.stdout

"""Check that the elements of a job array write the same folder as one command."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from data_tools.corpus.run import TokenizeRequest, tokenize_corpus
from tests.support.runs import REPOSITORY, child_environment

SCRIPT = REPOSITORY / "launch" / "slurm" / "tokenize.sbatch"


def run_element(element: int, of: int, source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    slurm = {
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_ARRAY_TASK_ID": str(element),
        "SLURM_ARRAY_TASK_COUNT": str(of),
        "SLURM_CPUS_PER_TASK": "1",
        "PYTHON": sys.executable,
    }
    arguments = ["--source", "jsonl", "--input", str(source), "--out", str(out)]
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, **child_environment(), **slurm},
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_documents(path: Path) -> Path:
    """Write documents for three chunks of at most 4 MB."""
    chance = random.Random(5)
    words = ["alpha", "beta", "gamma", "délta", "\n", "print(x)", "0123"]
    texts = [" ".join(chance.choices(words, k=2000)) for _ in range(900)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_elements_in_any_order_write_what_one_command_writes(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl")
    whole = tokenize_corpus(TokenizeRequest(source="jsonl", inputs=(str(source),), out=tmp_path / "whole", workers=1))
    for element in (2, 0, 1):
        result = run_element(element, 3, source, tmp_path / "array")
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "array" / "manifest.json").exists() == (element == 1), (
            "the element that finishes last writes it"
        )
    assert len(whole.shards_of("train")) >= 2
    assert contents(tmp_path / "array") == contents(tmp_path / "whole")
    again = run_element(0, 3, source, tmp_path / "array")
    assert "already complete" in again.stdout

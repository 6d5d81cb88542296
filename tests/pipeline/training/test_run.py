"""A run says at its start which validation split it measures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config.loading import config_from_json
from pipeline.training.run import train
from tests.support.runs import TINY_RUN, Sections, merged
from tests.support.token_files import documents, write_ours


def log_of_a_run(folder: Path, splits: dict[str, list[np.ndarray]], caplog: pytest.LogCaptureFixture) -> str:
    """Train for one step on these tokens, and return what the run logs."""
    write_ours(folder / "data", splits)
    changes: Sections = {
        "run": {"out_dir": str(folder / "run"), "compile": False},
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 16},
        "data": {"path": str(folder / "data")},
        "batch": {"tokens_per_step": 32},
        "schedule": {"warmup_steps": 0, "max_steps": 1},
    }
    with caplog.at_level("INFO"):
        train(config_from_json(merged(TINY_RUN, changes), "test"))
    return caplog.text


def test_a_run_states_its_validation_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = log_of_a_run(tmp_path, {"train": [documents(50)], "val": [np.arange(1000, dtype=np.uint16)]}, caplog)
    assert "validation: 1,000 tokens, 63 windows of 16, 8 of them per evaluation" in log
    assert "the validation split has 1,000 tokens in 0 documents" in log
    assert "losses on fewer than 16,384 tokens are noisy" in log


def test_a_run_without_a_validation_split_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = log_of_a_run(tmp_path, {"train": [documents(50)]}, caplog)
    assert "has no validation split: this run has no validation loss for it" in log
    assert "validation:" not in log

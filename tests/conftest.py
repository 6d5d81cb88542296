"""Fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.runs import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of real text: the first sources of the embedded corpus. Do not write to it."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")

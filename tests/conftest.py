"""Fixtures that all tests share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.runs import make_byte_corpus, make_corpus


def pytest_configure() -> None:
    """A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of real text: the first sources of the embedded corpus. Do not write to it."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="session")
def byte_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text in a vocabulary of bytes: runs on it are several times faster. Do not write to it."""
    return make_byte_corpus(tmp_path_factory.mktemp("byte_corpus") / "data")

"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.rank_server import shorten_ceilings
from tests.support.runs import make_byte_corpus, make_corpus


def pytest_configure() -> None:
    """Restore Ctrl-C, which a shell that starts the tests in the background makes them and their children ignore."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of whole runs and commands before the tests of single modules, so that processes end together."""
    tests = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(tests).parts[0] in ("pipeline", "data_tools"))


def pytest_collection_finish() -> None:
    """Let the garbage collector look at the objects of tests only. DeepSpeed collects many times per engine."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests with the marker ``gpu`` on a machine without a CUDA device."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Remove the log handlers of a command that a test has called in this process: later tests read the output."""
    loggers = [logging.getLogger(package) for package in ("pipeline", "data_tools", "launch")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def short_ceilings() -> None:
    shorten_ceilings()


@pytest.fixture
def gpu() -> torch.device:
    """Return the first GPU, for tests with the marker ``gpu``."""
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with token shards of real text. Do not write to it."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="session")
def byte_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same text with one token per byte, on which runs are several times faster. Do not write to it."""
    return make_byte_corpus(tmp_path_factory.mktemp("byte_corpus") / "data")

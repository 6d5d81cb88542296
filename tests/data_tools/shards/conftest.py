"""Fixtures for the tests of shards."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["npy", "arrow"])
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)

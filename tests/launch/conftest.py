"""Fixtures of stage 1 for the tests of its command."""

from tests.data_tools.conftest import reference, run_process

__all__ = ["reference", "run_process"]

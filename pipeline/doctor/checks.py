"""Run the checks that need torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.doctor.communication import check_communication, check_ranks
from pipeline.doctor.findings import Finding
from pipeline.doctor.machine import check_builds, check_compilers, check_machine, check_tokenizer


def run_checks(folder: Path, *, thorough: bool) -> list[Finding]:
    """Check everything except the packages.

    Args:
        folder: the folder for runs and data.
        thorough: also compile, and start two ranks. This takes a minute or two the first time.
    """
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "machine": lambda: check_machine(folder),
        "compilers": check_compilers,
        "tokenizer": lambda: [check_tokenizer()],
        "communication": check_communication,
    }
    if thorough:
        checks |= {"builds": check_builds, "two ranks": lambda: [check_ranks()]}
    return [finding for name, check in checks.items() for finding in _catch_failure(name, check)]


def _catch_failure(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run a check, and turn an exception into a finding, so that the other checks still run."""
    try:
        return list(check())
    except Exception as error:  # noqa: BLE001 - a broken machine can raise anything
        says = f"the check failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [Finding(name, "problem", says, "python -m pip install --force-reinstall -c constraints.txt -e .")]

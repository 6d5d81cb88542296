"""The whole examination, once it is known that torch can be imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.doctor.building import examine_builds, examine_compilers, examine_tokenizer
from pipeline.doctor.communication import examine_communication, examine_ranks
from pipeline.doctor.findings import Finding
from pipeline.doctor.machine import examine_machine


def examine(folder: Path, *, thorough: bool) -> list[Finding]:
    """Look at everything but the packages.

    Args:
        folder: where runs and data will be written.
        thorough: also compile, and let two ranks meet: a minute or two, the first time.
    """
    parts: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("machine", lambda: examine_machine(folder)),
        ("compilers", examine_compilers),
        ("tokenizer", lambda: [examine_tokenizer()]),
        ("communication", examine_communication),
    ]
    if thorough:
        parts += [("builds", examine_builds), ("two ranks", lambda: [examine_ranks()])]
    return [finding for name, part in parts for finding in _without_breaking(name, part)]


def _without_breaking(name: str, part: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What breaks on a machine that is out of order is a finding, too, and must not hide the others."""
    try:
        return list(part())
    except Exception as error:  # noqa: BLE001 - whatever a broken machine throws
        says = f"the examination broke: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [Finding(name, "problem", says, "python -m pip install --force-reinstall -c constraints.txt -e .")]

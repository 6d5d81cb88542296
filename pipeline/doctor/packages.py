"""Compare the installed Python and packages with setup.py and constraints.txt. This module does not import torch."""

import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement

from data_tools.errors import PROJECT, install_command
from pipeline.doctor.findings import Finding

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
DEVELOPMENT_EXTRAS = ("test", "lint")


def check_packages() -> list[Finding]:
    """Check the versions of Python and of the packages. Also check whether these versions were tested."""
    try:
        project = distribution(PROJECT)
    except PackageNotFoundError:
        return [Finding("packages", "problem", f"{PROJECT} is not installed in this environment", install_command())]
    return [_check_python(project), _check_required(project), *_check_tested(), *_check_extras(project)]


def _check_python(project: Distribution) -> Finding:
    needed = project.metadata["Requires-Python"]
    here = platform.python_version()
    if Requirement(f"python{needed}").specifier.contains(here, prereleases=True):
        return Finding("python", "ok", here)
    return Finding("python", "problem", f"{here}; {needed} is needed", "make a virtual environment with a newer Python")


def _check_required(project: Distribution) -> Finding:
    if faults := _faults(requirements(project, extra="")):
        return Finding("packages", "problem", "; ".join(faults), install_command())
    main = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "numpy"))
    return Finding("packages", "ok", main)


def _check_tested() -> Iterator[Finding]:
    """Check for versions that were not tested. If ``constraints.txt`` does not exist, yield nothing.

    The wheel does not contain this file.
    """
    if not CONSTRAINTS.is_file():
        return
    lines = [line.partition("#")[0].strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()]
    pinned = [requirement for line in lines if line and _applies(requirement := Requirement(line), extra="")]
    faults = _faults(pinned, ignore_missing=True)
    if not faults:
        yield Finding("tested versions", "ok", "all packages are as in constraints.txt")
        return
    shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
    yield Finding("tested versions", "note", f"not those of constraints.txt: {shown}", install_command())


def _check_extras(project: Distribution) -> Iterator[Finding]:
    for extra in project.metadata.get_all("Provides-Extra", []):
        if extra in DEVELOPMENT_EXTRAS:
            continue
        if faults := _faults(requirements(project, extra)):
            yield Finding(f"extra {extra}", "note", f"not complete: {'; '.join(faults)}", install_command(extra))
        else:
            yield Finding(f"extra {extra}", "ok", "installed")


def requirements(project: Distribution, extra: str) -> list[Requirement]:
    """Return the requirements that an extra (a set of optional dependencies) adds to a project.

    If ``extra`` is "", return the requirements that belong to no extra.
    """
    found = [Requirement(line) for line in project.requires or ()]
    return [r for r in found if _applies(r, extra) and (not extra or not _applies(r, ""))]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _faults(requirements: Iterable[Requirement], *, ignore_missing: bool = False) -> list[str]:
    faults = []
    for requirement in requirements:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if not ignore_missing:
                faults.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            faults.append(f"{requirement.name} is {found}, wanted {requirement.specifier}")
    return faults

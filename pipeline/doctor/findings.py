"""What an examination finds, and how a person and a program read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ``note``: training works, but slower, or without something that is optional. ``problem``: it does not.
    """

    subject: str
    level: Level
    says: str
    cure: str = ""  # a command where there is one

    def __post_init__(self) -> None:
        assert bool(self.cure) == (self.level != "ok"), "what is wrong has a cure, what is right needs none"


def has_problem(findings: Sequence[Finding]) -> bool:
    """Whether something that training needs is broken."""
    return any(finding.level == "problem" for finding in findings)


def format_findings(findings: Sequence[Finding]) -> str:
    """A line a finding, the cure on a line of its own."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.subject:<{width}}  {finding.says}")
        if finding.cure:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.cure}")
    return "\n".join(lines)


def findings_as_json(findings: Sequence[Finding]) -> str:
    """The same for programs: ``{"problem": false, "findings": [...]}``."""
    return json.dumps({"problem": has_problem(findings), "findings": [asdict(f) for f in findings]}, indent=2)

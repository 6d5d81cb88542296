"""Define the results of the doctor command's checks, and format them as text or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    The level ``note`` means that training is slower or lacks an optional feature. The level ``problem`` means that
    training does not work.
    """

    subject: str
    level: Level
    says: str
    cure: str = ""  # the solution, if possible a command

    def __post_init__(self) -> None:
        assert bool(self.cure) == (self.level != "ok"), "a note or a problem needs a cure, and nothing else has one"


def has_problem(findings: Sequence[Finding]) -> bool:
    return any(finding.level == "problem" for finding in findings)


def format_findings(findings: Sequence[Finding]) -> str:
    """Return one line per finding. If a finding has a solution, a second line contains it."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.subject:<{width}}  {finding.says}")
        if finding.cure:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.cure}")
    return "\n".join(lines)


def findings_as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as JSON text: ``{"problem": false, "findings": [...]}``."""
    return json.dumps({"problem": has_problem(findings), "findings": [asdict(f) for f in findings]}, indent=2)

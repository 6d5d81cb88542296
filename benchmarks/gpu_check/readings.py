"""Read the output of a step into a dict of figures. If the step found a problem, the dict has the key ``problem``."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_check.bounds import loss_bound
from benchmarks.gpu_check.steps import LOG_FILE, Figures
from benchmarks.gpu_check.trace import CLASSES, busy_share, longest, overlap_share, read_events, shares_of_time
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER, PROFILE_FOLDER
from pipeline.training.step_profile import TRACE_FILE
from tests.support.runs import read_curve


def read_result(folder: Path) -> Figures:
    figures: Figures = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return figures


def read_curve_of(
    run: Path, reference: Path, precision: str, *, keep_checkpoints: bool = True
) -> Callable[[Path], Figures]:
    """Return a function that compares the curve of a run with the reference curve, and then deletes checkpoints."""

    def read(_: Path) -> Figures:
        curve = read_curve(run)
        difference = curve.largest_loss_difference(read_curve(reference))
        figures: Figures = {"largest_difference": difference, "losses": curve.losses, "kernel": _kernel(run)}
        if not difference <= loss_bound(precision):
            figures["problem"] = f"the loss differs by {difference:.1e} nats, more than {loss_bound(precision):g}"
        if not keep_checkpoints:
            shutil.rmtree(run / CHECKPOINTS_FOLDER, ignore_errors=True)
        return figures

    return read


def _kernel(run: Path) -> str:
    log = (run.parent / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    lines = [line.split("attention ")[1].strip() for line in log.splitlines() if "attention " in line]
    return lines[-1] if lines else ""


def read_doctor(folder: Path) -> Figures:
    text = (folder / LOG_FILE).read_text(encoding="utf-8")
    findings = json.loads(text[text.index('{\n  "problem"') : text.rindex("}") + 1])["findings"]
    problems = [f"{finding['subject']}: {finding['says']}" for finding in findings if finding["level"] == "problem"]
    return {"findings": findings, "problem": "; ".join(problems)}


def read_tests(folder: Path) -> Figures:
    cases: dict[str, str] = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        cases[case.attrib["name"]] = outcome
    figures: Figures = {"tests": cases}
    if "failed" in cases.values():
        figures["problem"] = f"failed: {', '.join(name for name, outcome in cases.items() if outcome == 'failed')}"
    return figures


def read_profile(run: Path) -> Callable[[Path], Figures]:

    def read(_: Path) -> Figures:
        events = read_events(run / PROFILE_FOLDER / TRACE_FILE)
        return {
            "shares": shares_of_time(events),
            "longest": {kind: longest(events, kind, 3) for kind in CLASSES},
            "busy_share": busy_share(events),
            "overlap_share": overlap_share(events),
        }

    return read

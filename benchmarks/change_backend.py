"""Change the backend and the number of processes in the middle of a run, and compare with an uninterrupted run.

python -m benchmarks.change_backend                                # print the table
python -m benchmarks.change_backend --plot docs/figures/change-backend.svg
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.run import tokenize_corpus
from pipeline.report.colours import ALL
from pipeline.report.curves import STEPS, Chart, Curve
from pipeline.report.drawing import draw
from pipeline.run_folder.metrics import read_metrics
from tests.support.live_run import LiveRun
from tests.support.runs import CONFIGS, Sections, merged
from tests.support.tables import print_header, print_row

ROWS_EVERY_STEPS = 20
WIDTH_PIXELS = 560
Losses = dict[int, float]  # step -> training loss in nats
TITLE = "One run under three backends has the curve of an uninterrupted run"


@dataclass(frozen=True)
class Segment:
    """A part of a run under one backend. Ctrl-C ends it after ``last_step``, or it trains to the end."""

    config: str
    backend: str
    processes: int
    last_step: int | None = None

    def __str__(self) -> str:
        return f"{self.backend}, {self.processes} process{'es' * (self.processes > 1)}"


REFERENCE = (Segment("ddp", "DDP", 1),)
CHANGED = (Segment("zero3", "ZeRO-3", 2, 40), Segment("fsdp", "FSDP2", 1, 80), Segment("ddp", "DDP", 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the losses as SVG")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sections = quickstart_sections(scratch / "data")
        (reference,) = train(REFERENCE, scratch / "uninterrupted", sections)
        changed = train(CHANGED, scratch / "changed", sections)
    print_comparison(reference, changed)
    if arguments.plot:
        arguments.plot.write_text(draw_figure(reference, changed), encoding="utf-8")


def quickstart_sections(data: Path) -> Sections:
    """Tokenize the quickstart's text. Return the quickstart's config, which logs each step and hardly evaluates."""
    content = json.loads((CONFIGS / "quickstart.json").read_text())
    tokenize = content.pop("tokenize")
    tokenize_corpus(TokenizeRequest(out=data, source=tokenize["source"], val_fraction=tokenize["val_fraction"]))
    changes: Sections = {
        "data": {"path": str(data)},
        "logging": {"every_steps": 1},
        "evaluation": {"every_steps": content["schedule"]["max_steps"], "max_batches": 1, "sample": False},
    }
    return merged(content, changes)


def train(segments: Sequence[Segment], run_folder: Path, sections: Sections) -> list[Losses]:
    """Train one run in segments. Return the losses of each segment."""
    found: list[Losses] = []
    for segment in segments:
        with LiveRun(segment.config, run_folder, sections, segment.processes) as run:
            if segment.last_step:
                run.wait_for_step(segment.last_step, timeout_s=3600)
                run.process.send_signal(signal.SIGINT)
            status = run.wait(timeout_s=3600)
            if status and not segment.last_step:
                raise RuntimeError(f"status {status}:\n{run.output}")
        before = {step for losses in found for step in losses}
        rows = [row for row in read_metrics(run_folder) if row.get("loss") is not None]
        found.append({row["step"]: row["loss"] for row in rows if row["step"] not in before})
    return found


def print_comparison(reference: Losses, changed: Sequence[Losses]) -> None:
    """Print a table with some steps, and the largest loss difference of all steps."""
    print_header("step", f"uninterrupted: {REFERENCE[0]}", "interrupted twice", "backend of the interrupted run")
    differences = []
    for segment, losses in zip(CHANGED, changed, strict=True):
        differences += [abs(loss - reference[step]) for step, loss in losses.items()]
        for step in losses:
            if step % ROWS_EVERY_STEPS == 0:
                print_row(step, f"{reference[step]:.6f}", f"{losses[step]:.6f}", segment)
    print(f"\n{len(differences)} of {len(reference)} steps compared; largest difference {max(differences):.1e} nats")


def draw_figure(reference: Losses, changed: Sequence[Losses]) -> str:
    """Return an SVG with the losses of the uninterrupted run and of each segment, in light or dark colors."""
    labels = [f"uninterrupted: {REFERENCE[0]}", *(f"changed: {segment}" for segment in CHANGED)]
    curves = [
        Curve(run, label, [float(step) for step in losses], list(losses.values()))
        for run, (label, losses) in enumerate(zip(labels, [reference, *changed], strict=True))
    ]
    svg = draw(Chart("change_backend", "Training loss", STEPS, curves, logarithmic=True)).svg
    light, dark = ("; ".join(f"--{c.name}: {getattr(c, theme)}" for c in ALL) for theme in ("light", "dark"))
    style = f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    svg = svg.replace("<svg", f'<svg width="{WIDTH_PIXELS}"', 1)
    end = svg.index(">") + 1
    return f"{svg[:end]}\n <title>{TITLE}</title>\n <style>{style}</style>{svg[end:]}"


if __name__ == "__main__":
    main()

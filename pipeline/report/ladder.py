"""Compare the branches of a long run, in a table and a chart.

A branch continues the long run from one of its steps, and lets the learning rate decay.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.storage.atomic import write_bytes_durably
from pipeline.report.curves import TOKENS, Chart, Curve, thin_out
from pipeline.run_folder.metrics import read_metrics

log = logging.getLogger(__name__)

NAME = "ladder"  # the names of the written files without their suffixes
_COLUMNS = ("decay from step", "to step", "tokens", "validation loss before the decay", "after the decay", "run")


@dataclass(frozen=True)
class Branch:
    """A run that continues a long run from the step ``milestone`` and lets the learning rate decay."""

    milestone: int  # the step at which the decay begins
    stop: int  # the last step of the decay
    run: Path


@dataclass(frozen=True)
class Rung:
    """The result of one branch. A loss can be missing (None)."""

    milestone: int
    steps: int
    tokens: int | None  # trained by the long run and the branch together
    stable_loss: float | None  # the validation loss of the long run at the milestone
    loss: float | None  # the validation loss at the end of the branch
    run: str


def write_ladder(out: Path, stable: Path, branches: Sequence[Branch]) -> tuple[str, list[Path]]:
    """Compare the branches of a long run: write a table as Markdown and JSON, and a chart of the validation losses.

    Returns the table as Markdown, and the paths of the written files. If matplotlib is not installed, no chart is
    written.

    Args:
        out: the folder for the files.
        stable: the run folder of the long run.
    """
    before = _validation_losses(stable)
    rungs = []
    for branch in branches:
        after = _validation_losses(branch.run)
        tokens, loss = after.get(branch.stop, (None, None))
        stable_loss = before.get(branch.milestone, (None, None))[1]
        rungs.append(Rung(branch.milestone, branch.stop, tokens, stable_loss, loss, str(branch.run)))
    table = _format_table(rungs)
    contents = {
        f"{NAME}.md": table.encode(),
        f"{NAME}.json": (json.dumps([asdict(rung) for rung in rungs], indent=2) + "\n").encode(),
    }
    if picture := _draw_chart(list(before.values()), rungs):
        contents[f"{NAME}.png"] = picture
    for name, content in contents.items():
        write_bytes_durably(out / name, content)
    return table, [out / name for name in contents]


def _validation_losses(run_folder: Path) -> dict[int, tuple[int, float]]:
    """Return step -> (tokens, validation loss)."""
    rows = [row for row in read_metrics(run_folder) if row.get("val_loss") is not None]
    return {row["step"]: (row["tokens"], row["val_loss"]) for row in rows}


def _format_table(rungs: Sequence[Rung]) -> str:
    rows = [
        (
            f"{rung.milestone:,}",
            f"{rung.steps:,}",
            "" if rung.tokens is None else f"{rung.tokens:,}",
            "" if rung.stable_loss is None else f"{rung.stable_loss:.4f}",
            "" if rung.loss is None else f"{rung.loss:.4f}",
            f"`{rung.run}`",
        )
        for rung in rungs
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (_COLUMNS, ("---",) * len(_COLUMNS), *rows))


def _draw_chart(stable: list[tuple[int, float]], rungs: Sequence[Rung]) -> bytes | None:
    """Return a PNG of the validation loss against tokens, or None without a loss or matplotlib."""
    try:
        from pipeline.report.drawing import draw  # imports matplotlib, which is optional
    except ImportError as error:
        log.warning("no chart is drawn, because matplotlib cannot be imported (%s)", error)
        return None
    ends = [(rung.tokens, rung.loss) for rung in rungs if rung.tokens is not None and rung.loss is not None]
    points = thin_out([(float(tokens), loss) for tokens, loss in stable])
    curves = [
        Curve(0, "constant learning rate", [x for x, _ in points], [y for _, y in points]),
        Curve(1, "after a decay", [float(tokens) for tokens, _ in ends], [loss for _, loss in ends], dotted=True),
    ]
    curves = [curve for curve in curves if curve.x]
    title = "Validation loss against tokens"
    return draw(Chart(NAME, title, TOKENS, curves, logarithmic=True)).png if curves else None

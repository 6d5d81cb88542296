"""From run folders to files: the page, and a PNG a chart."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from data_tools.storage.atomic import write_bytes_durably
from pipeline.errors import ReportError
from pipeline.report.curves import charts_of
from pipeline.report.page import render_page
from pipeline.report.runs import read_runs

PAGE_FILE = "report.html"


def write_report(run_folders: Sequence[Path], out: Path) -> list[Path]:
    """Show runs, one or several over each other. They may be in progress.

    Returns:
        What was written, the page first.

    Raises:
        ReportError: a folder without a run, or matplotlib is not installed.
    """
    try:
        from pipeline.report.drawing import draw  # an extra, and slow to import
    except ImportError as error:
        raise ReportError(f"a report needs matplotlib ({error}): pip install 'gpt2-pipeline[plots]'") from error
    runs = read_runs(run_folders)
    pictures = [draw(chart) for chart in charts_of(runs)]
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    out.mkdir(parents=True, exist_ok=True)
    page = out / PAGE_FILE
    write_bytes_durably(page, render_page(runs, [picture.svg for picture in pictures], now).encode())
    for picture in pictures:
        write_bytes_durably(out / f"{picture.name}.png", picture.png)
    return [page, *(out / f"{picture.name}.png" for picture in pictures)]

"""Show runs: one HTML page that needs no network, and a PNG a chart. Several runs are drawn over each other."""

from __future__ import annotations

from pathlib import Path

from launch.cli import ArgumentParser, run_command, start_logging
from pipeline.report.page import write_report


def main() -> None:
    """Parse, write, say where."""
    parser = ArgumentParser(description=__doc__, example="python launch/report.py runs/ddp runs/z1 --out report")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, finished or in progress")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: report/ in the folder of the first run)")
    arguments = parser.parse_args()
    start_logging()
    page, *pictures = write_report(arguments.runs, arguments.out or arguments.runs[0] / "report")
    print(f"wrote {page} and {len(pictures)} PNG files beside it")


if __name__ == "__main__":
    run_command(main)

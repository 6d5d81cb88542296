"""List the runs in a folder in a table: their state, step, loss, speed, age, size and last checkpoint."""

import json
from pathlib import Path

from launch.cli import ArgumentParser, local_path, run_command, start_logging
from pipeline.report.overview import format_table, summarize_runs


def main() -> None:
    arguments = build_parser().parse_args()
    start_logging()
    runs = summarize_runs(arguments.folder)
    print(json.dumps([run.to_json() for run in runs], indent=2) if arguments.json else format_table(runs))


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, example="gpt2-pipeline runs runs")
    parser.add_argument(
        "folder", nargs="?", type=local_path, default=Path("runs"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    return parser


if __name__ == "__main__":
    run_command(main)

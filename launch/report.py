"""Show runs as one HTML page that needs no network, and one PNG file per chart. Each chart shows all given runs."""

from launch.cli import ArgumentParser, local_path, run_command, start_logging
from pipeline.report.page import write_report
from pipeline.run_folder.layout import REPORT_FOLDER


def main() -> None:
    arguments = build_parser().parse_args()
    start_logging()
    page, *pictures = write_report(arguments.runs, arguments.out or arguments.runs[0] / REPORT_FOLDER)
    print(f"wrote {page} and {len(pictures)} PNG files beside it")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, example="gpt2-pipeline report runs/ddp runs/zero1 --out report")
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN", help="run folders, finished or in progress")
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="folder to write to (default: report/ in the first run folder)"
    )
    return parser


if __name__ == "__main__":
    run_command(main)

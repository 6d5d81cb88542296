"""Check the packages, devices, compilers, disk, tokenizer and ranks of this machine. Print a solution for each problem.

The exit status is 1 if training cannot work.
"""

import sys
from pathlib import Path

try:
    from launch.cli import ArgumentParser, local_path, run_command
    from pipeline.doctor.findings import findings_as_json, format_findings, has_problem
    from pipeline.doctor.packages import check_packages
except ImportError as broken:  # a missing package is one of the problems that this command names
    sys.exit(f"error: {broken}; this environment lacks the project: python -m pip install -c constraints.txt -e .")


def main() -> None:
    arguments = build_parser().parse_args()
    findings = check_packages()
    try:
        from pipeline.doctor.machine import run_checks
    except (ImportError, OSError):  # torch raises OSError if it lacks a library of CUDA
        if not has_problem(findings):  # otherwise, a finding names the missing package
            raise
    else:
        findings += run_checks(arguments.folder, thorough=arguments.thorough)
    print(findings_as_json(findings) if arguments.json else format_findings(findings))
    sys.exit(1 if has_problem(findings) else 0)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, example="gpt2-pipeline doctor --folder runs")
    parser.add_argument(
        "--folder", type=local_path, default=Path(), metavar="DIR", help="folder for runs (default: the current folder)"
    )
    parser.add_argument(
        "--thorough", action="store_true", help="also compile, and start two ranks; a minute or two the first time"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    run_command(main)

"""Look at checkpoints, verify them, make room, and convert them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launch.cli import ArgumentParser, positive_int, run_command, start_logging
from pipeline.checkpoint.inventory import inspect, verify_checkpoints
from pipeline.checkpoint.pruning import prune
from pipeline.interop.conversion import convert


def main() -> None:
    """Parse, and do what the sub-command says."""
    parser = ArgumentParser(description=__doc__, example="python launch/checkpoint.py inspect runs/ddp")
    commands = parser.add_subparsers(required=True, metavar="inspect|verify|prune|convert")
    _add_inspect(commands)
    _add_verify(commands)
    _add_prune(commands)
    _add_convert(commands)
    arguments = parser.parse_args()
    start_logging()
    arguments.act(arguments)


def _add_inspect(commands: Any) -> None:
    def act(arguments: argparse.Namespace) -> None:
        report = inspect(arguments.folder)
        print(json.dumps(report.to_json(), indent=2) if arguments.json else report)

    description = "Show what a checkpoint holds, or which checkpoints a run has. Nothing is changed or hashed."
    example = "python launch/checkpoint.py inspect runs/ddp/checkpoints/step_00001000"
    parser = commands.add_parser("inspect", help="what is in it", description=description, example=example)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint, or a run folder")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(act=act)


def _add_verify(commands: Any) -> None:
    def act(arguments: argparse.Namespace) -> None:
        verify_checkpoints(arguments.folder, print)

    description = "Hash every file of a checkpoint, or of all of a run, and look at its structure."
    example = "python launch/checkpoint.py verify runs/ddp"
    parser = commands.add_parser("verify", help="whether it is whole", description=description, example=example)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint, or a run folder")
    parser.set_defaults(act=act)


def _add_prune(commands: Any) -> None:
    def act(arguments: argparse.Namespace) -> None:
        print(prune(arguments.run_folder, arguments.keep, dry_run=arguments.dry_run))

    description = (
        "Delete all checkpoints of a run but the newest that verify: older and damaged ones, those set aside, "
        "and leftovers of interrupted saves."
    )
    example = "python launch/checkpoint.py prune runs/ddp --keep 2 --dry-run"
    parser = commands.add_parser("prune", help="delete what is not needed", description=description, example=example)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder that no run is using")
    parser.add_argument(
        "--keep", type=positive_int, default=1, metavar="N", help="good ones that stay (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would go, and delete nothing")
    parser.set_defaults(act=act)


def _add_convert(commands: Any) -> None:
    def act(arguments: argparse.Namespace) -> None:
        print(convert(arguments.source, arguments.out))

    description = (
        "Rewrite a checkpoint as a single rank would have saved it, or import the ckpt.pt of nanoGPT. "
        "train.py --resume, evaluate.py and generate.py take the run folder that results."
    )
    example = "python launch/checkpoint.py convert nanoGPT/out/ckpt.pt --out runs/imported"
    parser = commands.add_parser("convert", help="make a new run of it", description=description, example=example)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a checkpoint, a run folder, or nanoGPT's ckpt.pt")
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="a run folder without checkpoints")
    parser.set_defaults(act=act)


if __name__ == "__main__":
    run_command(main)

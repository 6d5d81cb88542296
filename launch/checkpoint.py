"""Inspect, verify, prune, convert and average checkpoints."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from launch.cli import ArgumentParser, local_path, path_or_url, positive_int, run_command, start_logging


def main() -> None:
    arguments = build_parser().parse_args()
    start_logging()
    arguments.run(arguments)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, example="gpt2-pipeline checkpoint inspect runs/ddp")
    commands = parser.add_subparsers(required=True, metavar="inspect|verify|prune|convert|average")
    for add_command in (_add_inspect, _add_verify, _add_prune, _add_convert, _add_average):
        add_command(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from pipeline.checkpoint.inspection import inspect

        report = inspect(arguments.folder)
        print(json.dumps(asdict(report), indent=2, default=str) if arguments.json else report)

    description = "Show the contents of a checkpoint, or list the checkpoints of a run. Nothing is changed or hashed."
    example = "gpt2-pipeline checkpoint inspect runs/ddp/checkpoints/step_00001000"
    parser = commands.add_parser("inspect", help="show the contents", description=description, example=example)
    parser.add_argument("folder", type=path_or_url, metavar="DIR", help="a checkpoint, or a run folder, or its URL")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def _add_verify(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from pipeline.checkpoint.verification import verify_checkpoints

        verify_checkpoints(arguments.folder, print)

    description = "Check the structure and the hash of every file of a checkpoint, or of all checkpoints of a run."
    example = "gpt2-pipeline checkpoint verify runs/ddp"
    parser = commands.add_parser("verify", help="look for damage", description=description, example=example)
    parser.add_argument("folder", type=local_path, metavar="DIR", help="a checkpoint, or a run folder")
    parser.set_defaults(run=run)


def _add_prune(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from pipeline.checkpoint.retention import prune

        print(prune(arguments.folder, arguments.keep, dry_run=arguments.dry_run))

    description = (
        "Delete old, damaged and abandoned checkpoints, and the leftovers of interrupted saves. Keep the newest "
        "undamaged checkpoints, those of checkpoint.keep_every_steps, and the best one (checkpoint.keep_best)."
    )
    example = "gpt2-pipeline checkpoint prune runs/ddp --keep 2 --dry-run"
    parser = commands.add_parser("prune", help="delete what is not needed", description=description, example=example)
    parser.add_argument("folder", type=local_path, metavar="RUN", help="a run folder that no run is using")
    parser.add_argument(
        "--keep",
        type=positive_int,
        default=1,
        metavar="N",
        help="newest undamaged checkpoints to keep (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be deleted, and delete nothing")
    parser.set_defaults(run=run)


def _add_convert(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from pipeline.checkpoint.conversion import convert_checkpoint
        from pipeline.interop.nanogpt import import_nanogpt

        convert = import_nanogpt if arguments.source.is_file() else convert_checkpoint
        print(convert(arguments.source, arguments.out))

    description = (
        "Rewrite a checkpoint as a single rank would have saved it, or import nanoGPT's ckpt.pt or build-nanogpt's "
        "model_*.pt. "
        "train --resume, evaluate and generate accept the resulting run folder."
    )
    example = "gpt2-pipeline checkpoint convert nanoGPT/out/ckpt.pt --out runs/imported"
    parser = commands.add_parser("convert", help="write a new run folder", description=description, example=example)
    parser.add_argument(
        "source", type=local_path, metavar="SOURCE", help="a checkpoint, a run folder, or a file of nanoGPT"
    )
    parser.add_argument("--out", required=True, type=local_path, metavar="RUN", help="a run folder without checkpoints")
    parser.set_defaults(run=run)


def _add_average(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from pipeline.checkpoint.averaging import average_checkpoints

        print(average_checkpoints(arguments.folder, arguments.out, last=arguments.last, steps=arguments.steps))

    description = (
        "Write a new run whose weights are the mean of the weights of several checkpoints of a run. Their moving "
        "averages (averaging.ema) are averaged, too. The optimizer's state is that of the newest checkpoint. All "
        "commands accept the resulting run folder."
    )
    example = "gpt2-pipeline checkpoint average runs/ddp --last 5 --out runs/averaged"
    parser = commands.add_parser("average", help="average the weights", description=description, example=example)
    parser.add_argument("folder", type=local_path, metavar="RUN", help="a run folder")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--last", type=positive_int, metavar="N", help="average the newest N checkpoints")
    chosen.add_argument(
        "--steps", type=positive_int, nargs="+", metavar="N", help="average the checkpoints of these steps"
    )
    parser.add_argument("--out", required=True, type=local_path, metavar="RUN", help="a run folder without checkpoints")
    parser.set_defaults(run=run)


if __name__ == "__main__":
    run_command(main)

"""Write a checkpoint as a Hugging Face folder, or make a run of such a folder."""

from __future__ import annotations

from pathlib import Path

from launch.cli import ArgumentParser, run_command, start_logging
from pipeline.interop.hugging_face.exporting import DTYPES, export_checkpoint
from pipeline.interop.hugging_face.importing import import_folder


def main() -> None:
    """Parse, and go the one way or the other."""
    parser = ArgumentParser(
        description=__doc__, example="python launch/export.py --checkpoint runs/ddp --out exported/ddp"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="to export: a checkpoint, or a run folder (its newest good one)"
    )
    source.add_argument(
        "--from-hf",
        metavar="DIR_OR_NAME",
        help="to import: a folder of GPT2LMHeadModel, or a name on the hub, as openai-community/gpt2",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the folder to make; with --from-hf it is a run folder"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of the exported weights (default: float32, as they were trained)"
    )
    arguments = parser.parse_args()
    start_logging()
    if arguments.from_hf is None:
        print(export_checkpoint(arguments.checkpoint, arguments.out, arguments.dtype or "float32"))
    elif arguments.dtype:
        parser.error("--dtype: says how to export; an import is always in float32")
    else:
        print(import_folder(arguments.from_hf, arguments.out))


if __name__ == "__main__":
    run_command(main)

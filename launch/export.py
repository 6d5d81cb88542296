"""Export a checkpoint as a Hugging Face folder, or import such a folder as a new run."""

from pathlib import Path

from launch.cli import ArgumentParser, add_weights_option, run_command, start_logging
from pipeline.interop.hugging_face.exporting import DTYPES, export_checkpoint
from pipeline.interop.hugging_face.importing import import_folder


def main() -> None:
    """Parse the arguments, and export or import a model."""
    parser = build_parser()
    arguments = parser.parse_args()
    start_logging()
    if arguments.from_hf is None:
        print(export_checkpoint(arguments.checkpoint, arguments.out, arguments.dtype or "float32", arguments.weights))
    elif arguments.weights != "training":
        parser.error("--weights: only for exporting; a Hugging Face folder has one set of weights")
    elif arguments.dtype:
        parser.error("--dtype: only for exporting; an import is always in float32")
    else:
        print(import_folder(arguments.from_hf, arguments.out))


def build_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(
        description=__doc__, example="python launch/export.py --checkpoint runs/ddp --out exported/ddp"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="export a checkpoint, or a run folder's newest good one"
    )
    source.add_argument(
        "--from-hf",
        metavar="DIR_OR_NAME",
        help="import a folder of GPT2LMHeadModel, or a model on the hub by its name, e.g. openai-community/gpt2",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the folder to create; with --from-hf, a run folder"
    )
    add_weights_option(parser)
    parser.add_argument("--dtype", choices=list(DTYPES), help="dtype of the exported weights (default: float32)")
    return parser


if __name__ == "__main__":
    run_command(main)

"""Export a checkpoint as a Hugging Face folder or a GGUF file, or import a Hugging Face folder as a new run."""

import argparse

from launch.cli import ArgumentParser, add_weights_option, local_path, path_or_url, run_command, start_logging
from data_tools.errors import UserError, install_command
from pipeline.interop.export import FORMATS, GGUF, HUGGING_FACE, ExportFunction


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    start_logging()
    if arguments.private and not arguments.push_to_hub:
        parser.error("--private: only with --push-to-hub; add it, or leave --private out")
    if arguments.from_hf is None:
        _export(parser, arguments)
    elif arguments.weights != "training":
        parser.error("--weights: only for exporting; a Hugging Face folder has one set of weights")
    elif arguments.dtype:
        parser.error("--dtype: only for exporting; an import is always in float32")
    elif arguments.format:
        parser.error("--format: only for exporting; an import reads Hugging Face folders")
    elif arguments.push_to_hub:
        parser.error("--push-to-hub: only for exporting; leave it out")
    else:
        from pipeline.interop.hugging_face.importing import import_folder

        print(import_folder(arguments.from_hf, arguments.out))


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__, example="gpt2-pipeline export --checkpoint runs/ddp --out exported/ddp"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        type=path_or_url,
        metavar="DIR",
        help="export a checkpoint, or a run folder's newest undamaged one; also a URL such as s3://bucket/run",
    )
    source.add_argument(
        "--from-hf",
        metavar="DIR_OR_NAME",
        help="import a folder of GPT2LMHeadModel, or a model on the hub by its name, e.g. openai-community/gpt2",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=local_path,
        metavar="PATH",
        help="the folder to create; with --format gguf, the file; with --from-hf, a run folder",
    )
    add_weights_option(parser)
    parser.add_argument(
        "--format", choices=list(FORMATS), help=f"format of the export; gguf is llama.cpp's (default: {HUGGING_FACE})"
    )
    parser.add_argument(
        "--dtype", choices=FORMATS[GGUF], help="dtype of the exported weights; float16 only for gguf (default: float32)"
    )
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="also upload the export to the Hugging Face hub, as MODEL or USER/MODEL"
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: create the model as private")
    return parser


def _export(parser: ArgumentParser, arguments: argparse.Namespace) -> None:
    file_format, dtype = arguments.format or HUGGING_FACE, arguments.dtype or "float32"
    if file_format == HUGGING_FACE and arguments.out.suffix.lower() == f".{GGUF}":
        parser.error(f"--out {arguments.out}: the name of a GGUF file; add --format {GGUF}, or name a folder")
    if dtype not in FORMATS[file_format]:
        parser.error(f"--dtype {dtype}: only for --format {GGUF}; use {' or '.join(FORMATS[file_format])}")
    from pipeline.interop.hugging_face.publishing import check_access, push_to_hub

    export = _find_export(file_format)
    if arguments.push_to_hub:
        check_access(arguments.push_to_hub)
    written = export(arguments.checkpoint, arguments.out, dtype, arguments.weights)
    print(written, flush=True)
    if arguments.push_to_hub:
        print(f"pushed to {push_to_hub(written.path, arguments.push_to_hub, private=arguments.private)}")


def _find_export(file_format: str) -> ExportFunction:
    if file_format == HUGGING_FACE:
        from pipeline.interop.hugging_face.exporting import export_checkpoint

        return export_checkpoint
    try:
        from pipeline.interop.gguf_file import export_gguf  # needs the package gguf, which is optional
    except ImportError as error:
        raise UserError(f"--format {GGUF}: the package gguf is missing ({error}): {install_command(GGUF)}") from error
    return export_gguf


if __name__ == "__main__":
    run_command(main)

"""Inspect, verify and read token shards, or convert them from or to the formats of other programs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

from launch.cli import ArgumentParser, local_path, positive_int, quick_imports, run_command
from data_tools.errors import UserError
from data_tools.formatting import count_of, printable
from data_tools.options import AUTO, InputFormat, OutputFormat
from pipeline.distributed.environment import set_numpy_threads_default

if TYPE_CHECKING:
    from data_tools.shards.manifest import ShardRecord

_LINE_EVERY_S = 10.0


def main() -> None:
    set_numpy_threads_default()
    arguments = build_parser().parse_args()
    arguments.run(arguments)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, example="gpt2-pipeline shards inspect data/corpus")
    commands = parser.add_subparsers(required=True, metavar="inspect|verify|head|convert")
    for add_command in (_add_inspect, _add_verify, _add_head, _add_convert):
        add_command(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from data_tools.formats.inspection import inspect

        report = inspect(arguments.source, arguments.source_format, dict(arguments.split_of))
        print(json.dumps(report.to_json(), indent=2) if arguments.json else report)

    description = "Show a summary of a folder or file of tokens in any format. Changes nothing and reads no token."
    example = "gpt2-pipeline shards inspect data/fineweb10B"
    parser = commands.add_parser("inspect", help="show a summary", description=description, example=example)
    _add_source(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def _add_verify(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        with quick_imports():
            from data_tools.shards.verification import verify

        progress = ProgressLines("verified")
        manifest = verify(arguments.folder, arguments.workers, progress.advance)
        print(f"{arguments.folder}: all {len(manifest.shards):,} shards match the manifest")
        print(progress.summary())

    description = "Recompute everything that the manifest says: hashes, counts, and that ids are in the vocabulary."
    example = "gpt2-pipeline shards verify data/corpus"
    parser = commands.add_parser("verify", help="look for damage", description=description, example=example)
    parser.add_argument("folder", type=local_path, metavar="DIR", help="a folder with a manifest.json")
    _add_workers(parser)
    parser.set_defaults(run=run)


def _add_head(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from data_tools.formats.inspection import first_documents
        from data_tools.formats.opening import open_collection
        from data_tools.shards.manifest import TRAIN_SPLIT

        split, limits = (
            arguments.split or TRAIN_SPLIT,
            {"documents": arguments.documents, "characters": arguments.characters},
        )
        collection = open_collection(arguments.source, arguments.source_format, dict(arguments.split_of))
        for number, document in enumerate(first_documents(collection, split, **limits)):
            print(f"--- {split}, document {number}: {count_of(document.tokens, 'token')}")
            print(printable(document.text) + (" [...]" if document.is_cut else ""))

    description = "Show the first documents as text, with their numbers of tokens without <|endoftext|>."
    example = "gpt2-pipeline shards head data/corpus --split val --documents 2 --characters 500"
    parser = commands.add_parser("head", help="show the first documents", description=description, example=example)
    _add_source(parser)
    parser.add_argument("--split", metavar="NAME", help="the split (default: the training split)")
    parser.add_argument(
        "--documents", type=positive_int, default=3, metavar="N", help="how many documents (default: %(default)s)"
    )
    parser.add_argument(
        "--characters", type=positive_int, default=300, metavar="M", help="at most, per document (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def _add_convert(commands: Any) -> None:
    description = (
        "Write tokens to a new folder in another format: npy and arrow are our own, nanogpt is train.bin and "
        "val.bin, llmc is the format of llm.c and modded-nanogpt. The source may have any of these formats, or be "
        "the .bin with .idx of Megatron-LM and gpt-neox, or the .npy files of build-nanogpt. --in-place writes a "
        "manifest beside the shards of llm.c or build-nanogpt, so that training can read them where they are."
    )
    example = "gpt2-pipeline shards convert nanoGPT/data/openwebtext --to npy --out data/openwebtext"
    parser = commands.add_parser("convert", help="convert to another format", description=description, example=example)
    _add_source(parser)
    parser.add_argument("--out", type=local_path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--to", choices=get_args(OutputFormat), help="the format to write")
    parser.add_argument(
        "--in-place", action="store_true", help="write only a manifest.json beside shards of llm.c or build-nanogpt"
    )
    parser.add_argument(
        "--shard-tokens",
        type=positive_int,
        metavar="N",
        help="the largest number of tokens per shard (default: 100000000; npy and arrow keep the shards of a source "
        "that has a manifest)",
    )
    parser.add_argument("--name", help="the prefix of llmc's file names (default: the name of --out)")
    parser.add_argument(
        "--vocab-size",
        type=positive_int,
        metavar="N",
        help="the vocabulary size of SRC, if another program wrote it with another tokenizer than GPT-2's",
    )
    parser.add_argument(
        "--end-of-text",
        type=int,
        metavar="ID",
        help="with --vocab-size: the token between two documents (default: there is none)",
    )
    _add_workers(parser)
    parser.set_defaults(run=_convert)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=local_path, metavar="SRC", help="a folder, or a file of another program")
    parser.add_argument(
        "--from",
        dest="source_format",
        choices=(AUTO, *get_args(InputFormat)),
        default=AUTO,
        help="the format of SRC (default: %(default)s, which recognizes it by its content)",
    )
    parser.add_argument(
        "--split-of",
        nargs="+",
        default=[],
        type=_name_and_split,
        metavar="NAME=SPLIT",
        help="the split of a file of another program whose name does not contain it, such as corpus.bin=train",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive_int, metavar="N", help="how many threads (default: one per core)")


def _name_and_split(assignment: str) -> tuple[str, str]:
    name, _, split = assignment.rpartition("=")
    if not (name and split):
        raise argparse.ArgumentTypeError(f"must be NAME=SPLIT, it is {assignment!r}")
    return name, split


def _convert(arguments: argparse.Namespace) -> None:
    if arguments.in_place:
        _convert_in_place(arguments)
        return
    if arguments.out is None or arguments.to is None:
        raise UserError("give --out and --to, or --in-place")
    from data_tools.formats.conversion import convert
    from data_tools.formats.plan import ConvertRequest

    arguments.split_of = dict(arguments.split_of)
    request = ConvertRequest(**{option.name: getattr(arguments, option.name) for option in fields(ConvertRequest)})
    written, verified = ProgressLines("written"), ProgressLines("verified")
    conversion = convert(request, written.advance, verified.advance)
    print(f"{request.out}: {request.to}, from {conversion.source_format}")
    _print_splits(conversion.files)
    print(written.summary())


def _convert_in_place(arguments: argparse.Namespace) -> None:
    for option in ("out", "to", "shard_tokens", "name"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--in-place copies nothing, so it takes no --{option.replace('_', '-')}")
    if arguments.vocab_size is not None or arguments.end_of_text is not None:
        raise UserError("--in-place is for GPT-2's vocabulary; for another one, give --to npy --out DIR")
    from data_tools.formats.conversion import adopt_in_place
    from data_tools.shards.manifest import MANIFEST_NAME

    progress = ProgressLines("read")
    is_complete = (arguments.source / MANIFEST_NAME).exists()
    manifest = adopt_in_place(
        arguments.source, arguments.source_format, dict(arguments.split_of), arguments.workers, progress.advance
    )
    done = f"already has a {MANIFEST_NAME}; nothing is left to do" if is_complete else f"{MANIFEST_NAME} written"
    print(f"{arguments.source}: {done}")
    _print_splits(manifest.shards)
    if not is_complete:
        print(progress.summary())


def _print_splits(files: tuple[ShardRecord, ...]) -> None:
    for split in dict.fromkeys(file.split for file in files):
        members = [file for file in files if file.split == split]
        print(
            f"  {split}: {count_of(sum(file.tokens for file in members), 'token')}, "
            f"{count_of(sum(file.documents for file in members), 'document')}, "
            f"{sum(file.utf8_bytes for file in members):,} bytes of text, {count_of(len(members), 'file')}"
        )


class ProgressLines:
    """Prints the progress of a long command to standard error, one line every ten seconds."""

    def __init__(self, done: str) -> None:
        """Create a counter whose lines begin with ``done``. Time counts from the first call of ``advance``."""
        self._done = done
        self._bytes = 0
        self._started_s: float | None = None
        self._next_line_s = 0.0

    def advance(self, done_bytes: int) -> None:
        if self._started_s is None:
            self._started_s = time.monotonic()
            self._next_line_s = self._started_s + _LINE_EVERY_S
        self._bytes += done_bytes
        if time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + _LINE_EVERY_S
            print(self.summary(), file=sys.stderr, flush=True)

    def summary(self) -> str:
        megabytes = self._bytes / 1e6
        elapsed_s = 0.0 if self._started_s is None else time.monotonic() - self._started_s
        return f"{self._done} {megabytes:,.1f} MB in {elapsed_s:.1f} s, {megabytes / max(elapsed_s, 1e-9):,.0f} MB/s"


if __name__ == "__main__":
    run_command(main)

"""Stage 1: tokenize a corpus into shards."""

import re
from contextlib import closing
from dataclasses import fields
from functools import partial
from typing import Any, get_args

from launch.cli import ArgumentParser, path_or_url, positive_int, quick_imports, run_command, start_logging
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.worker_server import has_large_input, start_worker_server
from data_tools.errors import DataError
from data_tools.options import BadRows, Deduplication, EncoderChoice, Engine, ShardFormat, SourceKind
from pipeline.distributed.environment import set_numpy_threads_default

_DEFAULTS = {field.name: field.default for field in fields(TokenizeRequest)}
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def main() -> None:
    set_numpy_threads_default()
    options = vars(build_parser().parse_args())
    task, tasks = options.pop("task"), options.pop("tasks")
    request = TokenizeRequest(**{**options, "inputs": tuple(options["inputs"])})
    share = share_of(task, tasks, request)
    if has_large_input(request):
        start_worker_server(request)  # it imports its packages while this process imports its own
    start_logging()
    with quick_imports():
        from data_tools.corpus.run import find_complete, tokenize_corpus, tokenize_share
        from launch.tokenize_progress import ProgressDisplay, print_lengths, print_shards

    if manifest := find_complete(request):
        print(f"{request.out} is already complete")
        print_shards(manifest, request)
        return
    with closing(ProgressDisplay()) as display:
        tokenized = tokenize_corpus(request, display) if share is None else tokenize_share(request, *share, display)
    print(f"{display.encoded_megabytes():.1f} MB in {display.elapsed_s():.1f} s, {display.speed()}")
    if tokenized is not None:
        print_shards(tokenized, request)
        print_lengths(tokenized)
    elif share is not None:
        if request.deduplicate == "off":
            then = "the share that finishes last writes the manifest"
        else:
            then = "if all shares are done and the folder has no manifest, run all of them once more to encode"
        print(f"share {share[0]} of {share[1]} is done; {then}")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Tokenize documents with GPT-2's vocabulary into shards for training.",
        example="gpt2-pipeline tokenize --source jsonl --input corpus/*.jsonl.gz --out data/corpus",
    )
    parser.add_argument("--source", required=True, choices=get_args(SourceKind), help="where documents come from")
    parser.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, folders, glob patterns, or URLs of them; for hf the folder of one dataset, "
        "or its name or NAME@REVISION on the hub",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=path_or_url,
        metavar="DIR",
        help="a new folder for the shards, or a URL such as s3://bucket/folder",
    )
    add = partial(_add_with_default, parser)
    add("--format", "file format of the shards", choices=get_args(ShardFormat))
    add("--val-fraction", "fraction of the documents for validation", type=float, metavar="X")
    add("--shard-tokens", "maximum tokens per shard", type=int, metavar="N")
    add("--deduplicate", "exact leaves out documents that repeat an earlier one", choices=get_args(Deduplication))
    add("--on-bad-rows", "skip leaves out and reports rows that cannot be read", choices=get_args(BadRows))
    add(
        "--encoder",
        "all encoders give the same tokens; auto uses gigatoken if it is installed",
        choices=get_args(EncoderChoice),
    )
    _add_process_options(parser)
    add("--seed", "seed of the division into splits", type=int, metavar="N")
    _add_document_options(parser)
    return parser


def _add_process_options(parser: ArgumentParser) -> None:
    """Add the options that say which processes do the work."""
    add = partial(_add_with_default, parser)
    workers = (
        "processes on this machine (default: one per core, or fewer if the machine or container has less than 350 MB "
        "of memory per core)"
    )
    add("--workers", workers, type=int, metavar="N")
    add("--engine", "encode in processes of this machine, or on a Ray cluster", choices=get_args(Engine))
    add("--ray-address", "address of the Ray cluster (default: start a cluster here)", metavar="ADDRESS")
    parser.add_argument(
        "--task",
        type=int,
        metavar="I",
        help="for job arrays: do only share I of the work, from 0 to N - 1; needs --tasks N",
    )
    parser.add_argument("--tasks", type=positive_int, metavar="N", help="for job arrays: the number of shares")


def _add_document_options(parser: ArgumentParser) -> None:
    """Add the options that say which documents a source yields."""
    add = partial(_add_with_default, parser)
    add("--text-field", "field or column with the text, for jsonl, parquet and hf", metavar="NAME")
    add(
        "--document-separator",
        r"text between the documents of a text file; may contain the escapes \n, \t, \r and \\",
        type=unescape,
        metavar="TEXT",
    )
    add("--dataset-config", "configuration of a Hugging Face dataset", metavar="NAME")
    add("--dataset-split", "split of a Hugging Face dataset", metavar="NAME")
    add("--limit-documents", "stop after N documents", type=int, metavar="N")
    add("--limit-bytes", "stop after about N bytes of text", type=int, metavar="N")


def _add_with_default(parser: ArgumentParser, option: str, help: str, **settings: Any) -> None:
    """Add an option with the default that ``TokenizeRequest`` has for it."""
    default = _DEFAULTS[option[2:].replace("-", "_")]
    suffix = "" if default is None else f" (default: {default})"
    parser.add_argument(option, help=help + suffix, default=default, **settings)


def share_of(share: int | None, shares: int | None, request: TokenizeRequest) -> tuple[int, int] | None:
    """Return (``--task``, ``--tasks``). If neither option is given, return None: this process encodes all chunks.

    Raises:
        DataError: only one of the options is given, ``--task`` is out of range, or both are given for the engine
            ``ray``.
    """
    if share is None and shares is None:
        return None
    if share is None or shares is None:
        raise DataError("--task and --tasks go together, as --task 0 --tasks 8")
    if not 0 <= share < shares:
        raise DataError(f"--task must be from 0 to {shares - 1} with --tasks {shares}, it is {share}")
    if request.engine != "local":
        raise DataError("--task is for processes that are started by hand; --engine ray divides the work itself")
    return share, shares


def unescape(text: str) -> str:
    r"""Replace each escape sequence \n, \t, \r and \\ by its character."""
    return re.sub(r"\\[nrt\\]", lambda match: _ESCAPES[match.group()], text)


if __name__ == "__main__":
    run_command(main)

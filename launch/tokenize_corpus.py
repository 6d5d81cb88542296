"""Stage 1: tokenize a corpus into shards."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from data_tools.corpus.estimate import Estimate
from data_tools.corpus.run import Progress, TokenizeRequest, find_complete, tokenize_corpus, tokenize_share
from data_tools.errors import DataError
from data_tools.options import Deduplication, EncoderChoice, Engine, ShardFormat, SourceKind
from data_tools.shards import VAL_SPLIT, Manifest
from data_tools.storage.files import is_remote
from launch.cli import ArgumentParser, positive_int, run_command, start_logging

_LINE_EVERY_S = 30.0
_BAR_WIDTH = 40
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def main() -> None:
    """Parse the command line, tokenize, and say what was written."""
    start_logging()
    request, share = parse_request()
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
    elif share is not None and request.deduplicate != "off":
        print(f"{share_name(*share)} is done as far as it goes; when all {share[1]} are, run what is missing again")
    elif share is not None:
        print(f"{share_name(*share)} is done; whichever ends last writes the manifest")


def share_name(share: int, shares: int) -> str:
    """How messages call the work of one process among several."""
    return f"share {share} of {shares}"


def parse_request() -> tuple[TokenizeRequest, tuple[int, int] | None]:
    """The request of the command line, and which share of how many is wanted; every default is the request's own."""
    defaults = {field.name: field.default for field in fields(TokenizeRequest)}
    parser = ArgumentParser(
        description="Tokenize documents with GPT-2's vocabulary into shards for training.",
        example="python launch/tokenize_corpus.py --source jsonl --input corpus/*.jsonl.gz --out data/corpus",
    )

    def add(option: str, help: str, **settings: Any) -> None:
        name = option[2:].replace("-", "_")
        default = defaults[name]
        suffix = "" if default is None else f" (default: {default})"
        parser.add_argument(option, help=help + suffix, default=default, **settings)

    parser.add_argument("--source", required=True, choices=get_args(SourceKind), help="where documents come from")
    parser.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        metavar="PATH",
        help="files, folders, glob patterns, or URLs of them; for hf the name or folder of one dataset",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=place,
        metavar="DIR",
        help="a new folder for the shards, or a URL as s3://bucket/folder",
    )
    add("--format", "file format of the shards", choices=get_args(ShardFormat))
    add("--val-fraction", "share of documents for validation", type=float, metavar="X")
    add("--shard-tokens", "tokens in a shard, at most", type=int, metavar="N")
    add(
        "--deduplicate",
        "exact: leave out documents that repeat an earlier one",
        choices=get_args(Deduplication),
    )
    add("--encoder", "all give the same tokens; auto: gigatoken if it is installed", choices=get_args(EncoderChoice))
    add("--workers", "processes on this machine (default: all cores)", type=int, metavar="N")
    add("--engine", "what runs the work: processes of this machine, or a Ray cluster", choices=get_args(Engine))
    add("--ray-address", "of the cluster, with --engine ray (default: start one here)", metavar="ADDRESS")
    parser.add_argument(
        "--task", type=int, metavar="I", help="do only this share of the work, from 0 on; needs --tasks"
    )
    parser.add_argument("--tasks", type=positive_int, metavar="N", help="how many shares there are, as in a job array")
    add("--seed", "of the division into splits", type=int, metavar="N")
    add("--text-field", "field or column with the text, for jsonl, parquet, hf", metavar="NAME")
    add(
        "--document-separator",
        r"what divides a text file into documents; \n, \t, \r and \\ are understood",
        type=unescape,
        metavar="TEXT",
    )
    add("--dataset-config", "configuration of a Hugging Face dataset", metavar="NAME")
    add("--dataset-split", "split of a Hugging Face dataset", metavar="NAME")
    add("--limit-documents", "stop after N documents", type=int, metavar="N")
    add("--limit-bytes", "stop after about N bytes of text", type=int, metavar="N")
    arguments = parser.parse_args()
    return request_of(arguments), share_of(arguments)


def share_of(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """``--task`` and ``--tasks``.

    Raises:
        DataError: one without the other, or a task that is not among them.
    """
    share, shares = arguments.task, arguments.tasks
    if share is None and shares is None:
        return None
    if share is None or shares is None:
        raise DataError("--task and --tasks go together, as --task 0 --tasks 8")
    if not 0 <= share < shares:
        raise DataError(f"--task must be from 0 to {shares - 1} with --tasks {shares}, it is {share}")
    if arguments.engine != "local":
        raise DataError("--task is for processes that are started by hand; --engine ray divides the work itself")
    return share, shares


def place(text: str) -> Path | str:
    """A local path, or a URL as it stands."""
    return text if is_remote(text) else Path(text)


def request_of(arguments: argparse.Namespace) -> TokenizeRequest:
    """The request of parsed arguments."""
    values = {key: value for key, value in vars(arguments).items() if key not in ("task", "tasks")}
    return TokenizeRequest(**{**values, "inputs": tuple(values["inputs"] or ())})


def unescape(text: str) -> str:
    r"""Replace the escapes \n, \t, \r and \\, which are hard to type in a shell."""
    return re.sub(r"\\[nrt\\]", lambda match: _ESCAPES[match.group()], text)


class ProgressDisplay:
    """What is planned, then a bar on a terminal or a line now and then elsewhere; all on standard error."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._next_line_s = self._started_s + _LINE_EVERY_S
        self._estimate: Estimate | None = None
        self._at_start: Progress | None = None
        self._now = Progress()
        self._bar: tqdm[Any] | None = (
            tqdm(bar_format="{desc} [{elapsed}]", file=sys.stderr) if sys.stderr.isatty() else None
        )

    def planned(self, estimate: Estimate) -> None:
        """Say what is about to be done."""
        self._estimate = estimate
        tqdm.write(str(estimate), file=sys.stderr)

    def progressed(self, progress: Progress) -> None:
        """Show the progress; the first call tells what an interrupted run had finished."""
        self._now = progress
        if self._at_start is None:
            self._begin(progress)
        if self._bar is not None:
            self._bar.set_description_str(self._line())
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s += _LINE_EVERY_S
            print(self._line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self._bar is not None:
            self._bar.close()

    def encoded_megabytes(self) -> float:
        """Millions of bytes of text that this run encoded."""
        return (self._now.utf8_bytes - (self._at_start or Progress()).utf8_bytes) / 1e6

    def elapsed_s(self) -> float:
        """Seconds since the display was made."""
        return time.monotonic() - self._started_s

    def speed(self) -> str:
        """Text per second of this run, in words."""
        return f"{self.encoded_megabytes() / max(self.elapsed_s(), 1e-9):.1f} MB/s"

    def _begin(self, progress: Progress) -> None:
        self._at_start = progress
        if progress.documents:
            message = f"continuing after {progress.documents:,} documents in finished shards"
            tqdm.write(message, file=sys.stderr)

    def _line(self) -> str:
        return f"{self._now.documents:,} documents, {self._now.tokens:,} tokens, {self.speed()}{self._time_left()}"

    def _time_left(self) -> str:
        """By the speed so far; the size of the text is an estimate."""
        done = self.encoded_megabytes()
        if self._estimate is None or self._estimate.text_bytes is None or not done:
            return ""
        left = max(0.0, (self._estimate.text_bytes - self._now.utf8_bytes) / 1e6)
        return f", {tqdm.format_interval(left * self.elapsed_s() / done)} left"


def print_shards(manifest: Manifest, request: TokenizeRequest) -> None:
    """Say what the folder holds, and warn when there is nothing to validate on."""
    print(f"{request.out}:")
    for split in manifest.splits():
        shards = manifest.shards_of(split)
        documents = sum(shard.documents for shard in shards)
        utf8_bytes = sum(shard.utf8_bytes for shard in shards)
        print(
            f"  {split}: {manifest.tokens_of(split):,} tokens, {documents:,} documents, "
            f"{utf8_bytes:,} bytes of text, {len(shards):,} {request.format} shards"
        )
    if request.val_fraction > 0 and VAL_SPLIT not in manifest.splits():
        print(
            "warning: no document was drawn for validation, so there is no such split; raise --val-fraction, "
            "or cut a text file into documents with --document-separator",
            file=sys.stderr,
        )


def print_lengths(manifest: Manifest) -> None:
    """How long documents are, and how many were left out."""
    report = manifest.report or {}
    counts = report.get("documents_by_log2_tokens", [])
    first = next((k for k, count in enumerate(counts) if count), 0)
    print("  tokens in a document:")
    for k, count in enumerate(counts[first:], start=first):
        bar = "#" * math.ceil(_BAR_WIDTH * count / max(counts))
        print(f"  {1 << k:>11,} to {(2 << k) - 1:>11,}: {count:>12,} {bar}".rstrip())
    if repeated := report.get("repeated_documents"):
        print(f"  left out: {repeated:,} documents that have an equal one before them")


if __name__ == "__main__":
    run_command(main)

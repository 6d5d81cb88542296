"""Stage 1: tokenize a corpus into shards."""

import math
import re
import sys
import time
from contextlib import closing
from dataclasses import fields
from typing import Any, get_args

from tqdm import tqdm

from data_tools.corpus.estimate import Estimate
from data_tools.corpus.run import Observer, TokenizeRequest, find_complete, tokenize_corpus, tokenize_share
from data_tools.errors import DataError
from data_tools.formats.inspection import format_table
from data_tools.options import BadRows, Deduplication, EncoderChoice, Engine, ShardFormat, SourceKind
from data_tools.shards.contents import Contents
from data_tools.shards.manifest import VAL_SPLIT, Manifest
from data_tools.shards.validation_split import describe_small_validation
from launch.cli import ArgumentParser, path_or_url, positive_int, print_warning, run_command, start_logging

_LINE_EVERY_S = 30.0
_HISTOGRAM_WIDTH = 40
_WINDOW_TOKENS = 1024  # GPT-2's context
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def main() -> None:
    """Parse the command line, tokenize the corpus, and print a summary of the shards."""
    start_logging()
    options = vars(build_parser().parse_args())
    task, tasks = options.pop("task"), options.pop("tasks")
    request = TokenizeRequest(**{**options, "inputs": tuple(options["inputs"])})
    share = share_of(task, tasks, request)
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
    """Return the parser of the command line. Its default values are those of ``TokenizeRequest``."""
    defaults = {field.name: field.default for field in fields(TokenizeRequest)}
    parser = ArgumentParser(
        description="Tokenize documents with GPT-2's vocabulary into shards for training.",
        example="python launch/tokenize_corpus.py --source jsonl --input corpus/*.jsonl.gz --out data/corpus",
    )

    def add(option: str, help: str, **settings: Any) -> None:
        default = defaults[option[2:].replace("-", "_")]
        suffix = "" if default is None else f" (default: {default})"
        parser.add_argument(option, help=help + suffix, default=default, **settings)

    parser.add_argument("--source", required=True, choices=get_args(SourceKind), help="where documents come from")
    parser.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, folders, glob patterns, or URLs of them; for hf the name or folder of one dataset",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=path_or_url,
        metavar="DIR",
        help="a new folder for the shards, or a URL such as s3://bucket/folder",
    )
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
    add("--workers", "processes on this machine (default: all cores)", type=int, metavar="N")
    add("--engine", "encode in processes of this machine, or on a Ray cluster", choices=get_args(Engine))
    add("--ray-address", "address of the Ray cluster (default: start a cluster here)", metavar="ADDRESS")
    parser.add_argument(
        "--task",
        type=int,
        metavar="I",
        help="for job arrays: do only share I of the work, from 0 to N - 1; needs --tasks N",
    )
    parser.add_argument("--tasks", type=positive_int, metavar="N", help="for job arrays: the number of shares")
    add("--seed", "seed of the division into splits", type=int, metavar="N")
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
    return parser


def share_of(share: int | None, shares: int | None, request: TokenizeRequest) -> tuple[int, int] | None:
    """Check the options ``--task`` and ``--tasks``, and return their values.

    With these options, each process encodes only one share of the chunks. If neither option is given, return None. This
    process then encodes all chunks.

    Args:
        share: the value of ``--task``: which share this process encodes.
        shares: the value of ``--tasks``: the number of shares.

    Raises:
        DataError: only one of the two options is given, ``--task`` is out of range, or the engine is ``ray``.
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
    r"""Replace each escape sequence \n, \t, \r and \\ by its character.

    The user types the escape sequences, because the characters are hard to type in a shell.
    """
    return re.sub(r"\\[nrt\\]", lambda match: _ESCAPES[match.group()], text)


class ProgressDisplay(Observer):
    """Shows the estimate and the progress of tokenizing on standard error.

    On a terminal, it shows a progress bar. Otherwise, it prints a line every 30 seconds.
    """

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._next_line_s = self._started_s + _LINE_EVERY_S
        self._text_bytes: int | None = None
        self._at_start: Contents | None = None
        self._now = Contents()
        self._bar = tqdm(bar_format="{desc} [{elapsed}]", file=sys.stderr, disable=not sys.stderr.isatty())

    def noticed(self, line: str) -> None:
        """Print a message for the user about the input."""
        tqdm.write(line, file=sys.stderr)

    def planned(self, estimate: Estimate) -> None:
        """Print the estimate."""
        self._text_bytes = estimate.text_bytes
        tqdm.write(str(estimate), file=sys.stderr)

    def progressed(self, progress: Contents) -> None:
        """Show the progress.

        The first call comes before any work. At that time, ``progress`` contains only chunks that an earlier,
        interrupted command has finished.
        """
        self._now = progress
        if self._at_start is None:
            self._at_start = progress
            if progress.documents:
                tqdm.write(f"continuing after {progress.documents:,} documents in finished shards", file=sys.stderr)
        self._bar.set_description_str(self._line())
        if self._bar.disable and time.monotonic() >= self._next_line_s:
            self._next_line_s += _LINE_EVERY_S
            print(self._line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the progress bar. It stays visible on the terminal."""
        self._bar.close()

    def encoded_megabytes(self) -> float:
        """Return how many megabytes of text this command has encoded so far."""
        return (self._now.utf8_bytes - (self._at_start or Contents()).utf8_bytes) / 1e6

    def elapsed_s(self) -> float:
        """Return the number of seconds since this object was created."""
        return time.monotonic() - self._started_s

    def speed(self) -> str:
        """Return the encoding speed with its unit, such as ``12.0 MB/s``."""
        return f"{self.encoded_megabytes() / max(self.elapsed_s(), 1e-9):.1f} MB/s"

    def _line(self) -> str:
        line = f"{self._now.documents:,} documents, {self._now.tokens:,} tokens, {self.speed()}"
        done = self.encoded_megabytes()
        if self._text_bytes is None or not done:
            return line
        left = max(0.0, (self._text_bytes - self._now.utf8_bytes) / 1e6)
        return f"{line}, {tqdm.format_interval(left * self.elapsed_s() / done)} left"


def print_shards(manifest: Manifest, request: TokenizeRequest) -> None:
    """Print the contents of each split. Print a warning if the validation split is small or missing."""
    print(f"{request.out}:")
    windows = f"windows of {_WINDOW_TOKENS:,}"
    rows: list[tuple[str, ...]] = [
        ("split", "tokens", windows, "documents", "bytes of text", f"{request.format} shards")
    ]
    for split in manifest.splits():
        shards, tokens = manifest.shards_of(split), manifest.tokens_of(split)
        documents, utf8_bytes = sum(shard.documents for shard in shards), sum(shard.utf8_bytes for shard in shards)
        counts = (tokens, tokens // _WINDOW_TOKENS, documents, utf8_bytes, len(shards))
        rows.append((split, *(f"{count:,}" for count in counts)))
    print(*format_table(rows), sep="\n")
    if (manifest.report or {}).get("divided_documents"):
        print("  the source is one document: its beginning is for training and its end for validation")
    if request.val_fraction > 0 and (warning := describe_small_validation(manifest)):
        print_warning(warning)
    if request.val_fraction > 0 and VAL_SPLIT not in manifest.splits():
        if sum(shard.documents for shard in manifest.shards) == 1:
            cure = "tokenize more documents into another folder, or divide a text file with --document-separator"
        else:
            cure = "tokenize into another folder with a larger --val-fraction, or with another --seed"
        print_warning(f"no document was drawn for validation, so there is no validation split; {cure}")


def print_lengths(manifest: Manifest) -> None:
    """Print a histogram of the document lengths, and how many documents and rows were left out."""
    report = manifest.report or {}
    counts = report.get("documents_by_log2_tokens", [])
    first = next((k for k, count in enumerate(counts) if count), 0)
    print("  tokens per document:")
    for k, count in enumerate(counts[first:], start=first):
        bar = "#" * math.ceil(_HISTOGRAM_WIDTH * count / max(counts))
        print(f"  {1 << k:>11,} to {(2 << k) - 1:>11,}: {count:>12,} {bar}".rstrip())
    if repeated := report.get("repeated_documents"):
        print(f"  left out: {repeated:,} documents that repeat an earlier one")
    if empty := report.get("empty_documents"):
        print(f"  left out: {empty:,} empty documents")
    if bad_rows := report.get("bad_rows"):
        print(f"  left out: {bad_rows:,} rows that cannot be read; the first:")
        for place in report["first_bad_rows"]:
            print(f"    {' '.join(place.splitlines())}")


if __name__ == "__main__":
    run_command(main)

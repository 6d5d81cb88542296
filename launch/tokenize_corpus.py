"""Stage 1: tokenize a corpus into shards."""

from __future__ import annotations

import argparse
import re
import sys
import time
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.corpus import Progress, TokenizeRequest, find_complete, tokenize_corpus
from data_tools.shards import SHARD_FORMATS, VAL_SPLIT, Manifest
from data_tools.sources import SOURCE_KINDS
from launch.cli import ArgumentParser, run_command

_LINE_EVERY_S = 30.0
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def main() -> None:
    """Parse the command line, tokenize, and say what was written."""
    request = parse_request()
    if manifest := find_complete(request):
        print(f"{request.out} is already complete")
        print_shards(manifest, request)
        return
    with closing(ProgressDisplay()) as display:
        manifest = tokenize_corpus(request, display.update)
    print_shards(manifest, request)
    print(f"{display.encoded_megabytes():.1f} MB in {display.elapsed_s():.1f} s, {display.speed()}")


def parse_request() -> TokenizeRequest:
    """The request of the command line; every default is the request's own."""
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

    parser.add_argument("--source", required=True, choices=SOURCE_KINDS, help="where documents come from")
    parser.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        metavar="PATH",
        help="files, folders or glob patterns; for hf the name or folder of one dataset",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder for the shards")
    add("--format", "file format of the shards", choices=tuple(SHARD_FORMATS))
    add("--val-fraction", "share of documents for validation", type=float, metavar="X")
    add("--shard-tokens", "tokens in a shard, at most", type=int, metavar="N")
    add(
        "--workers",
        "encoding processes; does not change the result (default: all cores)",
        type=int,
        metavar="N",
    )
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
    return request_of(parser.parse_args())


def request_of(arguments: argparse.Namespace) -> TokenizeRequest:
    """The request of parsed arguments."""
    values = vars(arguments)
    return TokenizeRequest(**{**values, "inputs": tuple(values["inputs"] or ())})


def unescape(text: str) -> str:
    r"""Replace the escapes \n, \t, \r and \\, which are hard to type in a shell."""
    return re.sub(r"\\[nrt\\]", lambda match: _ESCAPES[match.group()], text)


class ProgressDisplay:
    """A bar on a terminal, a line now and then elsewhere; both on standard error."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._next_line_s = self._started_s + _LINE_EVERY_S
        self._at_start: Progress | None = None
        self._now = Progress(0, 0, 0)
        self._bar: tqdm[Any] | None = (
            tqdm(bar_format="{desc} [{elapsed}]", file=sys.stderr) if sys.stderr.isatty() else None
        )

    def update(self, progress: Progress) -> None:
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
        assert self._at_start is not None
        return (self._now.utf8_bytes - self._at_start.utf8_bytes) / 1e6

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
        return f"{self._now.documents:,} documents, {self._now.tokens:,} tokens, {self.speed()}"


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
            "warning: a single document cannot be divided, so there is no validation split; "
            "--document-separator cuts a text file into documents",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_command(main)

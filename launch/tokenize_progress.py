"""Show the progress and the result of the tokenize command."""

import math
import sys
import time

from tqdm import tqdm

from launch.cli import print_warning
from data_tools.corpus.estimate import Estimate
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.run import Observer
from data_tools.formats.inspection import format_table
from data_tools.formatting import count_of
from data_tools.shards.contents import Contents
from data_tools.shards.manifest import VAL_SPLIT, Manifest
from data_tools.shards.validation_split import advise_larger_validation, describe_small_validation

_LINE_EVERY_S = 30.0
_HISTOGRAM_WIDTH = 40
_WINDOW_TOKENS = 1024  # GPT-2's context


class ProgressDisplay(Observer):
    """Shows the progress of a tokenize request on standard error.

    On a terminal, this is a progress bar. Otherwise, it is a line every 30 seconds.
    """

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._next_line_s = self._started_s + _LINE_EVERY_S
        self._text_bytes: int | None = None
        self._at_start: Contents | None = None
        self._now = Contents()
        self._bar = tqdm(bar_format="{desc} [{elapsed}]", file=sys.stderr, disable=not sys.stderr.isatty())

    def noticed(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def planned(self, estimate: Estimate) -> None:
        self._text_bytes = estimate.text_bytes
        tqdm.write(str(estimate), file=sys.stderr)

    def progressed(self, progress: Contents) -> None:
        """Show the progress.

        The first call comes before this command encodes text. Its ``progress`` is the work that earlier, interrupted
        commands have finished.
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
        self._bar.close()

    def encoded_megabytes(self) -> float:
        """Return how many megabytes of text this command has encoded."""
        return (self._now.utf8_bytes - (self._at_start or Contents()).utf8_bytes) / 1e6

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def speed(self) -> str:
        return f"{self.encoded_megabytes() / max(self.elapsed_s(), 1e-9):.1f} MB/s"

    def _line(self) -> str:
        line = f"{self._now.documents:,} documents, {self._now.tokens:,} tokens, {self.speed()}"
        done = self.encoded_megabytes()
        if self._text_bytes is None or not done:
            return line
        left = max(0.0, (self._text_bytes - self._now.utf8_bytes) / 1e6)
        return f"{line}, {tqdm.format_interval(left * self.elapsed_s() / done)} left"


def print_shards(manifest: Manifest, request: TokenizeRequest) -> None:
    """Print the size of each split. Print a warning if the validation split is small or missing."""
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
            cure = advise_larger_validation(manifest)
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
        verb = "repeats" if repeated == 1 else "repeat"
        print(f"  left out: {count_of(repeated, 'document')} that {verb} an earlier one")
    if empty := report.get("empty_documents"):
        print(f"  left out: {count_of(empty, 'empty document')}")
    if bad_rows := report.get("bad_rows"):
        print(f"  left out: {count_of(bad_rows, 'row')} that cannot be read; the first:")
        for place in report["first_bad_rows"]:
            print(f"    {' '.join(place.splitlines())}")

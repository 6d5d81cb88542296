"""Inspect token files: summarize them in a report, or show the first documents as text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrays import TokenArray
from data_tools.errors import DataError
from data_tools.formats.collection import TokenCollection, Tokens
from data_tools.formats.opening import NATIVE, open_collection, recognize
from data_tools.options import AUTO
from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.shards.manifest import Manifest, load_manifest
from data_tools.shards.reader import TokenStream
from data_tools.tokenizer import load_tokenizer

_HEADINGS = ("split", "shards", "tokens", "documents", "bytes", "bytes/token", "largest shard", "smallest")
_UNKNOWN = "-"
_LONGEST_VALUE = 100
_READ_TOKENS = 1 << 16
_LARGEST_CHARACTER_BYTES = 4
# Keys of a manifest that ``about`` leaves out, or contains before the other keys.
_SHOWN_APART = ("format_version", "dtype", "tokenizer", "source", "settings", "shards", "sha256")


@dataclass(frozen=True)
class SplitReport:
    """The sizes of a split. Without a manifest, ``documents`` and ``utf8_bytes`` are None."""

    shards: int
    tokens: int
    documents: int | None
    utf8_bytes: int | None
    largest_shard_tokens: int
    smallest_shard_tokens: int

    @property
    def bytes_per_token(self) -> float | None:
        """Return the bytes of text per token, or None if unknown. ``END_OF_TEXT`` counts as a token."""
        return None if self.utf8_bytes is None or not self.tokens else self.utf8_bytes / self.tokens


@dataclass(frozen=True)
class FolderReport:
    """A summary of the tokens in a folder or file. ``str(report)`` returns a table.

    Attributes:
        problem: a message about the first file that is missing or has the wrong size, or None.
        about: values of the manifest, such as the tokenizer and the source. Without a manifest: the assumed tokenizer
            and a description of the source.
    """

    path: Path
    format: str
    problem: str | None
    about: dict[str, Any]
    splits: dict[str, SplitReport]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        rows = [(key, _as_text(value)) for key, value in self.about.items()]
        rows.append(("files", self.problem or "all there, of the right sizes"))
        lines = [f"{self.path}: format {self.format}", *(f"  {label:<11}{text}" for label, text in rows)]
        splits = (_row(name, split) for name, split in self.splits.items())
        return "\n".join([*lines, *format_table([_HEADINGS, *splits])])


def inspect(path: Path, format: str = AUTO, split_of: Mapping[str, str] | None = None) -> FolderReport:
    """Return a report on token files of any format, without reading the tokens.

    The arguments are those of ``open_collection``. In a folder with a manifest, a missing shard or a shard of the wrong
    size raises no error (see ``FolderReport.problem``).

    Raises:
        DataError: the format is not recognized, or the split of a file is unknown.
    """
    format = recognize(path) if format == AUTO else format
    if format == NATIVE and not split_of:
        return _report_manifest(path, load_manifest(path))
    collection = open_collection(path, format, split_of)
    splits = {name: _report_split(list(split.tokens_of_file.values())) for name, split in collection.splits.items()}
    tokenizer = f"{collection.tokenizer.name} is assumed; the files do not say"
    return FolderReport(path, format, None, {"tokenizer": tokenizer, "source": collection.source.options}, splits)


def _report_manifest(folder: Path, manifest: Manifest) -> FolderReport:
    value = manifest.to_json()
    splits = {}
    for split in manifest.splits():
        shards = manifest.shards_of(split)
        documents, utf8_bytes = sum(shard.documents for shard in shards), sum(shard.utf8_bytes for shard in shards)
        splits[split] = _report_split([shard.tokens for shard in shards], documents, utf8_bytes)
    about = {key: value[key] for key in ("tokenizer", "source", "settings")}
    about |= {key: item for key, item in value.items() if key not in _SHOWN_APART}
    if masked := sum(shard.mask_sha256 is not None for shard in manifest.shards):
        about["masks"] = f"{masked:,} shards have one: not all of their tokens are scored"
    return FolderReport(folder, NATIVE, _find_problem(folder, manifest), about, splits)


def _find_problem(folder: Path, manifest: Manifest) -> str | None:
    try:
        for split in manifest.splits():
            TokenStream(folder, manifest, split)
    except DataError as error:
        return str(error)
    return None


def _report_split(sizes: list[int], documents: int | None = None, utf8_bytes: int | None = None) -> SplitReport:
    return SplitReport(len(sizes), sum(sizes), documents, utf8_bytes, max(sizes), min(sizes))


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_as_text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def _row(name: str, split: SplitReport) -> tuple[str, ...]:
    counts = (split.shards, split.tokens, split.documents, split.utf8_bytes)
    ratio = split.bytes_per_token
    extremes = (split.largest_shard_tokens, split.smallest_shard_tokens)
    return (
        name,
        *(_UNKNOWN if count is None else f"{count:,}" for count in counts),
        _UNKNOWN if ratio is None else f"{ratio:.3f}",
        *(f"{tokens:,}" for tokens in extremes),
    )


def format_table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table. The first column is aligned to the left, and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


@dataclass(frozen=True)
class DocumentPreview:
    """The beginning of a document's text, and the number of its tokens without ``END_OF_TEXT``."""

    tokens: int
    text: str
    is_cut: bool


def first_documents(
    collection: TokenCollection, split: str, *, documents: int, characters: int
) -> Iterator[DocumentPreview]:
    """Yield the text of the first documents of a split. Cut each text after ``characters`` characters.

    In the split, an ``END_OF_TEXT`` separates two documents. It may also be the first or the last token.

    Raises:
        DataError: the split does not exist, or the tokenizer is not GPT-2's.
    """
    if split not in collection.splits:
        raise DataError(f"{collection.path} has no split {split!r}; it has {', '.join(collection.splits) or 'none'}")
    if collection.tokenizer != gpt2_tokenizer_record():
        raise DataError(
            f"{collection.path} is of the tokenizer {collection.tokenizer.name!r}; only gpt2 can be decoded"
        )
    # A token has at least one byte. Read one character more than needed, because the last character may be incomplete.
    kept_tokens = _LARGEST_CHARACTER_BYTES * (characters + 1)
    found = _split_documents(collection.splits[split].stream, collection.tokenizer.end_of_text, kept_tokens)
    for tokens, beginning in islice(found, documents):
        text = load_tokenizer().decode(beginning)
        yield DocumentPreview(tokens, text[:characters], is_cut=len(text) > characters or beginning.size < tokens)


def _split_documents(stream: Tokens, end_of_text: int, kept_tokens: int) -> Iterator[tuple[int, TokenArray]]:
    """Yield (number of tokens, first tokens) for each document."""
    size = 0
    kept: list[TokenArray] = []
    for start in range(0, stream.tokens, _READ_TOKENS):
        tokens = stream.read(start, min(_READ_TOKENS, stream.tokens - start))
        ends = np.flatnonzero(tokens == end_of_text)
        for number, piece in enumerate(np.split(tokens, ends)):
            if number:
                # An END_OF_TEXT at the beginning of the stream ends no document.
                if size or start + int(ends[number - 1]):
                    yield size, np.concatenate([*kept, tokens[:0]])
                size, kept, piece = 0, [], piece[1:]
            kept.append(piece[: max(0, kept_tokens - size)])
            size += piece.size
    if size:
        yield size, np.concatenate(kept)

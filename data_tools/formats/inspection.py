"""What a folder or file of tokens says about itself. Nothing is changed, and no token is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import DataError
from data_tools.formats.collection import TokenCollection
from data_tools.formats.detection import AUTO, open_collection, recognise
from data_tools.formats.native import NATIVE
from data_tools.shards import Manifest, TokenStream, load_manifest

_HEADINGS = ("split", "shards", "tokens", "documents", "bytes", "bytes/token", "largest shard", "smallest")
_UNKNOWN = "-"
_LONGEST_VALUE = 100
# Keys of a manifest that have a row of their own, or say nothing to a person.
_SHOWN_APART = ("format_version", "dtype", "tokenizer", "source", "settings", "shards", "sha256")


@dataclass(frozen=True)
class SplitReport:
    """A split in numbers; documents and bytes of text are None where only reading all tokens would tell."""

    shards: int
    tokens: int
    documents: int | None
    utf8_bytes: int | None
    largest_shard_tokens: int
    smallest_shard_tokens: int

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text a token, ``END_OF_TEXT`` included; None where it is unknown or there is no token."""
        return None if self.utf8_bytes is None or not self.tokens else self.utf8_bytes / self.tokens


@dataclass(frozen=True)
class FolderReport:
    """Tokens of any format at a glance.

    Attributes:
        path: as the user named it.
        format: one of ``INPUT_FORMATS``.
        problem: why the files are not those of the manifest; None: they are all there, of the right sizes.
        about: what else the manifest says, as JSON values; of a foreign format, what is assumed.
        splits: by name.
    """

    path: Path
    format: str
    problem: str | None
    about: dict[str, Any]
    splits: dict[str, SplitReport]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        rows = [(key, _as_text(value)) for key, value in self.about.items()]
        rows.append(("files", self.problem or "all there, of the right sizes"))
        lines = [f"{self.path}: format {self.format}", *(f"  {label:<11}{text}" for label, text in rows)]
        return "\n".join([*lines, *_table([_HEADINGS, *(_row(name, split) for name, split in self.splits.items())])])


def inspect(path: Path, format: str = AUTO, split_of: Mapping[str, str] | None = None) -> FolderReport:
    """Look at a folder of ours, or at foreign files; a folder of ours with damaged shards is shown all the same.

    Args:
        path, format, split_of: as in ``open_collection``.

    Raises:
        DataError: nothing is there, the format cannot be told, the manifest or a foreign file is damaged.
    """
    format = recognise(path) if format == AUTO else format
    if format == NATIVE and not split_of:
        return _report_manifest(path, load_manifest(path))
    return _report_foreign(open_collection(path, format, split_of))


def _report_manifest(folder: Path, manifest: Manifest) -> FolderReport:
    value = manifest.to_json()
    splits = {}
    for split in manifest.splits():
        shards = manifest.shards_of(split)
        sizes = [shard.tokens for shard in shards]
        documents = sum(shard.documents for shard in shards)
        utf8_bytes = sum(shard.utf8_bytes for shard in shards)
        splits[split] = SplitReport(len(shards), sum(sizes), documents, utf8_bytes, max(sizes), min(sizes))
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


def _report_foreign(collection: TokenCollection) -> FolderReport:
    splits = {}
    for name, split in collection.splits.items():
        sizes = [file.tokens for file in split.files]
        splits[name] = SplitReport(len(sizes), sum(sizes), None, None, max(sizes), min(sizes))
    tokenizer = f"{collection.tokenizer.name} is assumed; the files do not say"
    about = {"tokenizer": tokenizer, "source": collection.source.options}
    return FolderReport(collection.path, collection.format, None, about, splits)


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


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]

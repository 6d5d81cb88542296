"""The manifest of a folder of shards: its fields, and reading it with every field checked."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from data_tools.errors import DataError
from data_tools.storage.files import sha256_of_json

FORMAT_VERSION = 1
TOKEN_DTYPE_NAME = "uint16"
MANIFEST_NAME = "manifest.json"
TRAIN_SPLIT = "train"
VAL_SPLIT = "val"

_MASK_SUFFIX = ".mask.npy"
# The hash of all other keys. A manifest that another program wrote may do without.
_SEAL = "sha256"
_MADE = "made"
_OPTIONAL = ("report", _MADE)
_SHA256 = re.compile(r"[0-9a-f]{64}")
Record = TypeVar("Record", "TokenizerRecord", "SourceRecord", "ShardRecord")


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer whose ids the shards hold."""

    name: str
    vocab_size: int
    end_of_text: int
    vocabulary_sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """Where the documents came from; ``options`` is everything that chose them."""

    kind: str
    options: dict[str, Any]


@dataclass(frozen=True)
class ShardRecord:
    """One shard: its file inside the folder, what it holds, and the SHA-256 of the file.

    ``mask_sha256`` is that of the file beside it that says which of its tokens are scored; None: all are.
    """

    file: str
    split: str
    tokens: int
    documents: int
    utf8_bytes: int
    sha256: str
    mask_sha256: str | None = None

    @property
    def mask_file(self) -> str | None:
        """The file of its mask inside the folder; None: it has none."""
        return None if self.mask_sha256 is None else mask_file_of(self.file)

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; what is None has no key."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: Any, place: str) -> ShardRecord:
        """A checked record of a parsed JSON object; ``place`` says where it stood.

        Raises:
            DataError: a key is missing or unknown, a value has the wrong type or is impossible.
        """
        record = _record_from_json(cls, value, place)
        if not _is_inside_folder(record.file):
            raise DataError(f"{place}: file {record.file!r} must be a relative path inside the folder")
        for name in ("tokens", "documents", "utf8_bytes"):
            if getattr(record, name) < 0:
                raise DataError(f"{place}: {name} must be 0 or more, it is {getattr(record, name)}")
        for name in ("sha256", "mask_sha256"):
            digest = getattr(record, name)
            if digest is not None and not _SHA256.fullmatch(digest):
                raise DataError(f"{place}: {name} must be 64 hexadecimal digits, it is {digest!r}")
        return record


@dataclass(frozen=True)
class Manifest:
    """All that a folder of shards says about itself.

    Attributes:
        tokenizer: whose ids the shards hold.
        source: where the documents came from.
        settings: how documents were laid out (format, shard size, seed and fraction of the split).
        shards: in the order in which their tokens follow each other within a split.
        report: what was found on the way (lengths of documents, repeated ones); None: nothing is known.
        made: when and with what; says nothing of the contents. None: nothing is known.
    """

    tokenizer: TokenizerRecord
    source: SourceRecord
    settings: dict[str, Any]
    shards: tuple[ShardRecord, ...]
    format_version: int = FORMAT_VERSION
    dtype: str = TOKEN_DTYPE_NAME
    report: dict[str, Any] | None = None
    made: dict[str, Any] | None = None

    def splits(self) -> tuple[str, ...]:
        """Names of the splits that exist, in the order of their first shards."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def shards_of(self, split: str) -> tuple[ShardRecord, ...]:
        """The shards of a split in the order of its tokens; none for an unknown split."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def tokens_of(self, split: str) -> int:
        """Tokens of a split, one ``END_OF_TEXT`` per document included."""
        return sum(shard.tokens for shard in self.shards_of(split))

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values, version and dtype first, its own SHA-256 last."""
        value = {**asdict(self), "shards": [shard.to_json() for shard in self.shards]}
        value = {"format_version": value.pop("format_version"), "dtype": value.pop("dtype"), **value}
        value = {key: item for key, item in value.items() if key not in _OPTIONAL or item is not None}
        return {**value, _SEAL: sha256_of_json(value)}

    def to_bytes(self) -> bytes:
        """The manifest as the file has it."""
        return (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode("ascii")

    def content_sha256(self) -> str:
        """SHA-256 of all that says something of the contents: the same whenever and wherever they were made."""
        return sha256_of_json({key: value for key, value in self.to_json().items() if key not in (_MADE, _SEAL)})


def load_manifest(folder: Path | str) -> Manifest:
    """Read and check the manifest of a folder.

    Raises:
        DataError: there is none, it is no JSON, of another version or dtype, or a field is wrong; one line that
            says where and what would be right.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path.parent} has no {MANIFEST_NAME}; make one with launch/tokenize_corpus.py") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, place: str) -> Manifest:
    """Check the bytes of a manifest; ``place`` says where they stood.

    Raises:
        DataError: as ``load_manifest``.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON: {error}; delete the folder and tokenize again") from error
    version = _expect_object(value, place).get("format_version")
    # The version decides what the other keys mean, so it is judged before them.
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise DataError(
            f"{place}: format_version is {version!r}, this program reads {FORMAT_VERSION}; "
            "delete the folder and tokenize again"
        )
    seal = value.pop(_SEAL, None)
    _expect_keys(value, [field.name for field in fields(Manifest)], place, _OPTIONAL)
    if value["dtype"] != TOKEN_DTYPE_NAME:
        raise DataError(f"{place}: dtype is {value['dtype']!r}, it must be {TOKEN_DTYPE_NAME!r}")
    shards = _expect_type(value["shards"], list, f"{place}: shards")
    manifest = Manifest(
        tokenizer=_record_from_json(TokenizerRecord, value["tokenizer"], f"{place}: tokenizer"),
        source=_record_from_json(SourceRecord, value["source"], f"{place}: source"),
        settings=_expect_object(value["settings"], f"{place}: settings"),
        shards=tuple(ShardRecord.from_json(shard, f"{place}: shards[{index}]") for index, shard in enumerate(shards)),
        report=_expect_object(value["report"], f"{place}: report") if "report" in value else None,
        made=_expect_object(value[_MADE], f"{place}: {_MADE}") if _MADE in value else None,
    )
    if seal not in (None, sha256_of_json(value)):
        raise DataError(f"{place}: contents changed (its own SHA-256 differs); delete the folder and tokenize again")
    _expect_masks_agree(manifest, place)
    return manifest


def mask_file_of(shard_file: str) -> str:
    """Where the mask of a shard stands: ``train_000000.npy`` has ``train_000000.mask.npy``."""
    path = PurePosixPath(shard_file)
    return str(path.with_name(path.stem + _MASK_SUFFIX))


def _expect_masks_agree(manifest: Manifest, place: str) -> None:
    for split in manifest.splits():
        shards = [shard for shard in manifest.shards_of(split) if shard.tokens]
        masked = [shard.file for shard in shards if shard.mask_sha256 is not None]
        plain = [shard.file for shard in shards if shard.mask_sha256 is None]
        if masked and plain:
            raise DataError(
                f"{place}: of the split {split!r}, {masked[0]} has a mask and {plain[0]} has none; "
                "all shards of a split need one, or none"
            )


def _record_from_json(record_type: type[Record], value: Any, place: str) -> Record:
    """Build a record whose fields are strings, integers or objects, each checked against its annotation."""
    record_fields = fields(record_type)
    optional = [field.name for field in record_fields if field.default is not MISSING]
    _expect_keys(value, [field.name for field in record_fields], place, optional)
    types: Mapping[str, type] = {"str": str, "str | None": str, "int": int, "dict[str, Any]": dict}
    for field in record_fields:
        if field.name not in optional or value.get(field.name) is not None:
            _expect_type(value[field.name], types[str(field.type)], f"{place}: {field.name}")
    return record_type(**value)


def _expect_keys(value: Any, names: list[str], place: str, optional: Collection[str] = ()) -> None:
    present = _expect_object(value, place).keys()
    if missing := [name for name in names if name not in present and name not in optional]:
        raise DataError(f"{place}: missing key {missing[0]!r}")
    if unknown := [name for name in present if name not in names]:
        raise DataError(f"{place}: unknown key {unknown[0]!r}; the keys are {', '.join(names)}")


def _expect_object(value: Any, place: str) -> dict[str, Any]:
    checked: dict[str, Any] = _expect_type(value, dict, place)
    return checked


def _expect_type(value: Any, expected: type, place: str) -> Any:
    names = {str: "a string", int: "an integer", dict: "an object", list: "a list"}
    if not isinstance(value, expected) or isinstance(value, bool):
        raise DataError(f"{place} must be {names[expected]}, it is {json.dumps(value)[:80]}")
    return value


def _is_inside_folder(file: str) -> bool:
    path = PurePosixPath(file)
    return path.parts != () and not path.is_absolute() and ".." not in path.parts and "\0" not in file

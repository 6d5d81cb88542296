"""Define the manifest of a folder of token shards. Read it, and check every field."""

import json
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    with_config,
)

from data_tools.errors import DataError, one_line_read_errors
from data_tools.storage.content import require_fetched
from data_tools.storage.json_values import sha256_of_json
from data_tools.vocabulary import VOCABULARY_SHA256

FORMAT_VERSION = 1
TOKEN_DTYPE_NAME = "uint16"
MANIFEST_NAME = "manifest.json"
TRAIN_SPLIT = "train"
VAL_SPLIT = "val"
NO_TOKEN = -1  # the value of ``end_of_text`` if the vocabulary has no such token

_MASK_SUFFIX = ".mask.npy"
# The key of the hash of all other keys. Another program may omit this key.
_SEAL = "sha256"
_OPTIONAL = ("report", "made")
TOKENIZE_AGAIN = "restore it from a copy, or delete the folder and tokenize again"
# What a value must be, by the kind of pydantic's error.
_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "dict_type": "an object",
    "dataclass_type": "an object",
    "tuple_type": "a list",
    "greater_than_equal": "0 or more",
    "string_pattern_mismatch": "64 hexadecimal digits",
    "value_error": "a relative path inside the folder",
}


def _require_inside_folder(file: str) -> str:
    path = PurePosixPath(file)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in file:
        raise ValueError
    return file


# An object that may be missing (then it is None), but must not be null.
OptionalObject = Annotated[dict[str, Any] | None, GetPydanticSchema(lambda _, schema_of: schema_of(dict[str, Any]))]
Count = Annotated[StrictInt, Field(ge=0)]
Sha256 = Annotated[StrictStr, Field(pattern="^[0-9a-f]{64}$")]
FileInside = Annotated[StrictStr, AfterValidator(_require_inside_folder)]
_forbid_unknown_keys = with_config(ConfigDict(extra="forbid"))


@_forbid_unknown_keys
@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that created the tokens in the shards.

    Attributes:
        end_of_text: the id of the token that separates documents. ``NO_TOKEN`` if there is no such token.
        vocabulary_sha256: empty if the vocabulary is unknown.
    """

    name: StrictStr
    vocab_size: StrictInt
    end_of_text: StrictInt
    vocabulary_sha256: StrictStr

    @property
    def is_gpt2(self) -> bool:
        """Return whether the vocabulary is GPT-2's, under any name."""
        return self.vocabulary_sha256 == VOCABULARY_SHA256

    def differs_from(self, other: "TokenizerRecord") -> bool:
        """Return whether the two vocabularies differ. An unknown vocabulary differs only from GPT-2's."""
        if not self.vocabulary_sha256 or not other.vocabulary_sha256:
            return self.is_gpt2 != other.is_gpt2
        return self.vocabulary_sha256 != other.vocabulary_sha256

    def __str__(self) -> str:
        return f"{self.name!r} (vocabulary {self.vocabulary_sha256[:12] or 'unknown'})"


def other_tokenizer(vocab_size: int, end_of_text: int = NO_TOKEN) -> TokenizerRecord:
    """Return the record of a tokenizer that is not GPT-2's. Only these numbers of it are known."""
    return TokenizerRecord("other", vocab_size, end_of_text, "")


@_forbid_unknown_keys
@dataclass(frozen=True)
class SourceRecord:
    """The source of the documents. ``options`` determines which documents were read."""

    kind: StrictStr
    options: dict[str, Any]


@_forbid_unknown_keys
@dataclass(frozen=True)
class ShardRecord:
    """The entry for one shard in a manifest.

    A mask file says which tokens are scored (count in the loss). Without a mask file, ``mask_sha256`` is None, and all
    tokens are scored.
    """

    file: FileInside
    split: StrictStr
    tokens: Count
    documents: Count
    utf8_bytes: Count
    sha256: Sha256
    mask_sha256: Sha256 | None = None

    @property
    def mask_file(self) -> str | None:
        """Return the name of the shard's mask file, or None if the shard has no mask."""
        return None if self.mask_sha256 is None else mask_file_of(self.file)

    @property
    def files(self) -> list[str]:
        """Return the names of the shard's files: the mask file if there is one, then the token file."""
        return [name for name in (self.mask_file, self.file) if name is not None]

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values, without values that are None."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@_forbid_unknown_keys
@dataclass(frozen=True)
class Manifest:
    """The description of a folder of token shards.

    Attributes:
        settings: the options for the shards, such as their format.
        shards: the records of all shards. The shards of a split are in the order of their tokens.
        report: statistics about the documents, such as their lengths, or None.
        made: when and with which software versions the folder was written, or None.
    """

    tokenizer: TokenizerRecord
    source: SourceRecord
    settings: dict[str, Any]
    shards: tuple[ShardRecord, ...]
    report: OptionalObject = None
    made: OptionalObject = None

    def splits(self) -> tuple[str, ...]:
        """Return the names of the splits, in their order in ``shards``."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def shards_of(self, split: str) -> tuple[ShardRecord, ...]:
        """Return the records of a split's shards, in the order of their tokens. A missing split has no records."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def tokens_of(self, split: str) -> int:
        """Return the number of tokens in a split, including one ``END_OF_TEXT`` per document."""
        return sum(shard.tokens for shard in self.shards_of(split))

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values. The last value is a SHA-256 of all values before it."""
        content = {**asdict(self), "shards": [shard.to_json() for shard in self.shards]}
        content = {key: item for key, item in content.items() if key not in _OPTIONAL or item is not None}
        value = {"format_version": FORMAT_VERSION, "dtype": TOKEN_DTYPE_NAME, **content}
        return {**value, _SEAL: sha256_of_json(value)}

    def to_bytes(self) -> bytes:
        """Return the content of the file ``manifest.json``."""
        return (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode("ascii")

    def content_sha256(self) -> str:
        """Return a SHA-256 of the manifest without the attribute ``made``. It identifies the folder's contents."""
        return sha256_of_json({key: value for key, value in self.to_json().items() if key not in ("made", _SEAL)})


_NESTED_RECORDS: dict[Any, type[Any]] = {"tokenizer": TokenizerRecord, "source": SourceRecord, "shards": ShardRecord}


def load_manifest(folder: Path | str) -> Manifest:
    """Read and check the manifest of a folder.

    Raises:
        DataError: the manifest is missing, is not JSON, has an unknown version or dtype, or has a wrong field.
    """
    path = Path(folder) / MANIFEST_NAME
    with one_line_read_errors(path):
        try:
            require_fetched(path)
            return parse_manifest(path.read_bytes(), str(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            exists = path.parent.exists()
            problem = f"{path.parent} has no {MANIFEST_NAME}" if exists else f"{path.parent.absolute()} does not exist"
            converted = ", or from token files of other programs with gpt2-pipeline shards convert" if exists else ""
            raise DataError(f"{problem}; make one with gpt2-pipeline tokenize{converted}") from error


def parse_manifest(content: bytes, place: str) -> Manifest:
    """Parse the content of a manifest file, and check every field. Error messages begin with ``place``."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON: {error}; {TOKENIZE_AGAIN}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place} must be an object, it is {json.dumps(value)[:80]}")
    # Check the version first, because it decides the meaning of the other keys.
    version, dtype = value.get("format_version"), value.get("dtype")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise DataError(
            f"{place}: format_version is {version!r}, this program reads {FORMAT_VERSION}; {TOKENIZE_AGAIN}"
        )
    if dtype != TOKEN_DTYPE_NAME:
        raise DataError(f"{place}: dtype is {dtype!r}, it must be {TOKEN_DTYPE_NAME!r}")
    seal = value.pop(_SEAL, None)
    fields_only = {key: item for key, item in value.items() if key not in ("format_version", "dtype")}
    manifest = _validate(fields_only, place)
    if seal not in (None, sha256_of_json(value)):
        raise DataError(f"{place}: contents changed (its own SHA-256 differs); {TOKENIZE_AGAIN}")
    _require_consistent_masks(manifest, place)
    return manifest


def mask_file_of(shard_file: str) -> str:
    """Return the name of the mask file of a shard: ``train_000000.mask.npy`` for ``train_000000.npy``."""
    path = PurePosixPath(shard_file)
    return str(path.with_name(path.stem + _MASK_SUFFIX))


def _require_consistent_masks(manifest: Manifest, place: str) -> None:
    for split in manifest.splits():
        shards = [shard for shard in manifest.shards_of(split) if shard.tokens]
        masked = [shard.file for shard in shards if shard.mask_sha256 is not None]
        plain = [shard.file for shard in shards if shard.mask_sha256 is None]
        if masked and plain:
            raise DataError(
                f"{place}: in the split {split!r}, {masked[0]} has a mask and {plain[0]} has none; "
                "all shards of a split need one, or none"
            )


@cache
def _schema() -> TypeAdapter[Manifest]:
    # Not built at import, because this is slow and not every process reads a manifest.
    return TypeAdapter(Manifest)


def _validate(value: dict[str, Any], place: str) -> Manifest:
    try:
        return _schema().validate_python(value)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
    kind, location = mistake["type"], mistake["loc"]
    if kind == "missing":
        raise DataError(f"{place}{_as_path(location[:-1])}: missing key {location[-1]!r}")
    if kind == "unexpected_keyword_argument":
        keys = fields(Manifest if len(location) == 1 else _NESTED_RECORDS[location[0]])
        raise DataError(
            f"{place}{_as_path(location[:-1])}: unknown key {location[-1]!r}; "
            f"the keys are {', '.join(key.name for key in keys)}"
        )
    expected = _EXPECTED.get(kind, f"valid ({mistake['msg']})")
    raise DataError(f"{place}{_as_path(location)} must be {expected}, it is {json.dumps(mistake['input'])[:80]}")


def _as_path(location: tuple[int | str, ...]) -> str:
    """Return ``: shards[1]: tokens`` for ``("shards", 1, "tokens")``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f": {key}" for key in location)

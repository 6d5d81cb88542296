"""Read the rows of an evaluation task's dataset, from a file or from the Hugging Face hub."""

import hashlib
import json
import re
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_tools.errors import DataError, json_type
from data_tools.storage.content import describe_content, describe_decoded, require_fetched
from pipeline.distributed.world import World

Row = dict[str, Any]


@dataclass(frozen=True)
class HubData:
    """The name, config and splits of a dataset on the Hugging Face hub."""

    address: str
    config: str | None
    split: str
    shots_split: str | None = None  # the split for few-shot examples; if None, ``split``

    def __str__(self) -> str:
        return f"hf://datasets/{self.address}{f' ({self.config})' if self.config else ''}, {self.split}"


@dataclass(frozen=True)
class Rows:
    """The rows of a dataset, where they come from, and a hash that identifies them."""

    rows: Sequence[Row]
    origin: str
    sha256: str  # the hash of the file, or of the rows from the hub as JSON lines with sorted keys

    def where(self, number: int) -> str:
        """Return the place of a row as text for error messages. The first row has number 0."""
        return f"{self.origin}: row {number + 1}"


def text_field(row: Row, key: str) -> str:
    """Return the text under a key of a row.

    Raises:
        KeyError: the key is missing.
        ValueError: the value is not a text.
    """
    if not isinstance(row[key], str):
        raise ValueError(f"{key} is {as_json(row[key])}; it must be a text")
    return row[key]


def texts_field(row: Row, key: str) -> list[str]:
    """Return the list of texts under a key of a row.

    Raises:
        KeyError: the key is missing.
        ValueError: the value is not a list of at least two texts.
    """
    texts = row[key]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} is {as_json(texts)}; it must be a list of texts")
    if len(texts) == 1:
        raise ValueError(f"{key} has one text; a choice needs at least two")
    return texts


def index_field(row: Row, key: str, count: int, first: int = 0) -> int:
    """Return the index of the right choice, from 0 to ``count - 1``.

    In the row, the first choice has the number ``first``.

    Raises:
        KeyError: the key is missing.
        ValueError: the value is not an integer (as a number or as text), or no choice has this number.
    """
    match = re.fullmatch(r"(\d+)(\.0)?", str(row[key]).strip())  # Parquet files of pandas may have 1.0
    index = int(match[1]) - first if match else -1
    if not 0 <= index < count:
        expected = f"the number of the right choice, {first} to {first + count - 1}"
        raise ValueError(f"{key} is {as_json(row[key])}; it must be {expected}")
    return index


def as_json(value: object) -> str:
    """Return a value as shortened JSON, for error messages."""
    return textwrap.shorten(json.dumps(value, ensure_ascii=False, default=str), 60, placeholder=" ...")


def read_file(path: Path, *, by_line: bool = False) -> Rows:
    """Read the rows of a file.

    A ``.jsonl``, ``.ndjson`` or ``.json`` file contains one object per line, or one array of objects. A ``.parquet``
    file contains a table. Any other file is UTF-8 text, and becomes one row with the column ``text``.

    Args:
        by_line: whether each line of a text file becomes a row. If True, empty lines and white space at the end of
            lines are left out.

    Raises:
        DataError: the file cannot be read, is compressed or is empty.
    """
    try:
        require_fetched(path)
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a .jsonl, .parquet or text file") from error
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst"):
        raise DataError(f"{path} is compressed; decompress it, because files of examples are read as they are")
    if suffix in (".jsonl", ".ndjson", ".json"):
        rows = _parse_lines(content, path)
    elif suffix == ".parquet":
        rows = _parse_parquet(content, path)
    else:
        try:
            text = content.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            reason = describe_content(path, "html") or f"is not UTF-8 text: {error.reason} at byte {error.start}"
            raise DataError(f"{path} {reason}") from error
        if found := describe_decoded(content):
            raise DataError(f"{path} {found}")
        rows = _lines_of(text) if by_line else [{"text": text}]
    if not rows or rows == [{"text": ""}]:
        raise DataError(f"{path} is empty")
    return Rows(rows, str(path), hashlib.sha256(content).hexdigest())


def _lines_of(text: str) -> list[Row]:
    lines = (line.rstrip() for line in text.split("\n"))
    return [{"text": line} for line in lines if line]


def _parse_lines(content: bytes, path: Path) -> list[Row]:
    rows = []
    with suppress(ValueError, RecursionError):
        if isinstance(array := json.loads(content), list) and all(isinstance(row, dict) for row in array):
            return array
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if found := describe_content(path):
                raise DataError(f"{path} {found}") from error
            raise DataError(f"{path}: line {number} is not JSON ({error}); expected one object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is {json_type(row)}; expected one object per line")
        rows.append(row)
    return rows


def _parse_parquet(content: bytes, path: Path) -> list[Row]:
    try:
        return pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: texts and dates that Python refuses
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        found = describe_content(path, "parquet") or f"is not a whole Parquet file: {reason}"
        raise DataError(f"{path} {found}") from error


def read_hub(data: HubData, world: World) -> Rows:
    """Read a split of a dataset on the Hugging Face Hub. Every rank must call this function.

    Raises:
        DataError: the dataset cannot be loaded.
    """
    world.call_on_main(lambda: _download(data) and None)
    rows = world.call_on_each(lambda: _download(data))  # each host has its own cache
    lines = "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)
    return Rows(rows, str(data), hashlib.sha256(lines.encode()).hexdigest())


def _download(data: HubData) -> list[Row]:
    import datasets  # takes a second to import, and only this function needs it

    try:
        return list(datasets.load_dataset(data.address, data.config, split=data.split))
    # The library can raise errors of file systems and HTTP clients. These errors have no common base class.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot load {data} from the Hugging Face hub: {reason}; give a file with --data") from error

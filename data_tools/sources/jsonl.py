"""Read documents from JSON files, which may be compressed.

A file contains one JSON record per line, or one JSON array of records.
"""

import codecs
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import orjson

from data_tools.errors import DataError, json_type, list_names
from data_tools.sources.files import READ_BYTES, FileSource, Slice, compression_of, decode_utf8, open_decompressed
from data_tools.sources.rows import BadRowError, OnBadRow, parse_rows, stop_at_bad_row
from data_tools.storage.content import describe_content, describe_decoded
from data_tools.storage.files import is_remote

JSONL_SUFFIXES = tuple(
    name + compression for name in (".jsonl", ".ndjson", ".json") for compression in ("", ".gz", ".zst")
)
#: A record with one of these fields is a conversation and not a text.
CHAT_FIELDS = ("messages", "conversations", "conversation")
#: Fields that name the speaker of a message.
ROLE_FIELDS = ("role", "from")
_JSON_BLANKS = " \t\r\n"
_LONGEST_KEY = 40  # in a message
# At a larger offset, counting the lines before a bad line takes too long.
_COUNTED_BYTES = 128 << 20


class JsonFileSource(FileSource):
    """The base class for sources that read JSON files."""

    def __init__(self, inputs: Sequence[str], **settings: str | None) -> None:
        super().__init__(inputs, JSONL_SUFFIXES, **settings)

    def _is_read_whole(self, path: str) -> bool:
        # Each remote file would cost a request before the work starts.
        return not is_remote(path) and _is_array(path)


class JsonlSource(JsonFileSource):
    """Files of JSON objects. One string field of each object contains the document."""

    def __init__(self, inputs: Sequence[str], text_field: str) -> None:
        super().__init__(inputs, text_field=text_field)
        self._text_field = text_field

    def read(self, source_slice: Slice, on_bad_row: OnBadRow = stop_at_bad_row) -> Iterator[str]:
        return parse_rows(
            read_records(source_slice), lambda row: text_of_record(row.parse(), self._text_field, row), on_bad_row
        )


class Line(NamedTuple):
    """One line of a file. ``str(line)`` says where the line is. ``offset`` counts decompressed bytes."""

    path: str
    offset: int
    content: bytes

    def __str__(self) -> str:
        if self.offset > _COUNTED_BYTES:
            return f"{self.path}: line at byte {self.offset}"
        number, left = 1, self.offset
        with open_decompressed(self.path) as file:
            while left and (content := file.read(min(left, READ_BYTES))):
                number += content.count(b"\n")
                left -= len(content)
        return f"{self.path}:{number}"

    def parse(self, *, exact_integers: bool = False) -> Any:
        """Return the JSON value in the line.

        Args:
            exact_integers: whether integers of more than 64 bits stay integers. Otherwise, they become floats, and
                parsing is faster. An integer that is too long for Python (4300 digits) always becomes infinite.

        Raises:
            BadRowError: the line is not UTF-8 or not JSON.
            DataError: the whole file is of another kind, for example a tar archive.
        """
        if not exact_integers:
            with suppress(orjson.JSONDecodeError):
                return orjson.loads(self.content)
        try:
            # The standard library also reads lone surrogates and NaN. Its error messages are better.
            return _parse_json(self.content.decode())
        except (ValueError, RecursionError) as error:
            self._raise_bad_line(error)

    def _raise_bad_line(self, error: ValueError | RecursionError) -> NoReturn:
        """Raise the BadRowError or DataError for a line that cannot be parsed."""
        if self.offset == 0 and (found := describe_decoded(self.content)):
            raise DataError(f"{self.path} {found}") from error
        text = decode_utf8(self.content, self.path, self.offset)
        if found := describe_content(self.path, compression_of(self.path)):
            raise DataError(f"{self.path} {found}") from error
        content = text.rstrip(_JSON_BLANKS)
        cause = _describe_json_error(error)
        if not content.strip("\0"):
            cause = "the line holds only NUL bytes, as after an interrupted copy"
        elif isinstance(error, json.JSONDecodeError):
            if not text.endswith("\n") and _is_cut_off(content, error):
                cause = "the file ends inside a record; if it was cut off, copy or download it again"
            elif error.pos >= len(content):
                cause = "the line ends inside a record; jq -c . writes each record of a file as one line"
        raise BadRowError(self, f"not valid JSON ({cause}); each line must be one JSON object") from error


class ArrayRecord(NamedTuple):
    """One record of a file that contains a JSON array. ``str(record)`` says where the record is."""

    path: str
    number: int
    value: Any

    def __str__(self) -> str:
        return f"{self.path}: record {self.number}"

    def parse(self, *, exact_integers: bool = False) -> Any:
        """Return the JSON value, always with exact integers (see ``Line.parse``)."""
        return self.value


def read_records(source_slice: Slice) -> Iterator[Line | ArrayRecord]:
    """Yield the records that begin in a range of bytes of a file.

    If the file is a JSON array, the range from byte 0 yields all records. Other ranges yield none.
    """
    if not _is_array(source_slice.path):
        yield from read_lines(source_slice)
    elif source_slice.start == 0:
        for number, value in enumerate(_load_array(source_slice.path)):
            yield ArrayRecord(source_slice.path, number, value)


def read_lines(source_slice: Slice) -> Iterator[Line]:
    """Yield the lines that begin in a range of bytes of a file. Skip empty lines and byte order marks."""
    with open_decompressed(source_slice.path) as file:
        offset = source_slice.start
        if offset:
            # Skip a line that crosses the start, but not a line that begins exactly at the start.
            offset = file.seek(offset - 1)
            # The limit lets a long line take constant memory.
            while offset < source_slice.stop and (content := file.readline(READ_BYTES)):
                offset += len(content)
                if content.endswith(b"\n"):
                    break
        # A compressed file is one slice, and the number of its decompressed bytes is not known.
        stop = math.inf if compression_of(source_slice.path) else source_slice.stop
        while offset < stop and (line := file.readline()):
            content = line.removeprefix(codecs.BOM_UTF8)  # in the middle of a file, if files were joined with cat
            if content and not content.isspace():
                yield Line(source_slice.path, offset + len(line) - len(content), content)
            offset += len(line)


def text_of_record(record: Any, text_field: str, place: object) -> str:
    """Return the document in a record, which is a JSON object or a row of a dataset.

    Raises:
        BadRowError: the record is not an object, or the field ``text_field`` is missing or not a string. The message
            contains ``str(place)``.
    """
    if not isinstance(record, dict):
        cure = "; --source instructions reads chats" if isinstance(record, list) else ""
        raise BadRowError(place, f"holds {json_type(record)}; each record must be one JSON object{cure}")
    if text_field not in record:
        is_chat = any(name in record for name in (*CHAT_FIELDS, "instruction"))
        cure = "choose one with --text-field"
        if is_chat:
            cure = "--source instructions reads JSON files of chats and instructions"
        elif lists := [name for name, value in record.items() if _is_name_in_jq(name) and _is_list_of_objects(value)]:
            cure += f", or, if the records are in {lists[0]}, write them as lines with jq -c '.{lists[0]}[]'"
        raise BadRowError(place, f"no field {text_field!r}; the fields are {list_names(record)}; {cure}")
    text = record[text_field]
    if not isinstance(text, str):
        raise BadRowError(
            place,
            f"field {text_field!r} is {json_type(text)}, it must be a string; the fields are {list_names(record)}",
        )
    return text


def _is_name_in_jq(name: str) -> bool:
    """Return whether ``.name`` selects a key in jq, and is short enough for a message."""
    return name.isascii() and name.isidentifier() and len(name) <= _LONGEST_KEY


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_array(path: str) -> bool:
    """Return whether a file is one JSON array of records. A list of messages is a chat, not an array of records."""
    with open_decompressed(path) as file:
        head = file.read(READ_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
        if not head.startswith(b"["):
            return False
        first = _first_element(head) or _first_element(head + file.readline())
    return not (isinstance(first, dict) and any(name in first for name in ROLE_FIELDS))


def _first_element(head: bytes) -> Any:
    """Return the first element of a JSON array that begins with ``head``, or None if it is incomplete."""
    try:
        return json.JSONDecoder().raw_decode(head[1:].decode("utf-8", "replace").lstrip())[0]
    except (ValueError, RecursionError):
        return None


def _load_array(path: str) -> list[Any]:
    with open_decompressed(path) as file:
        content = file.read()
    text = decode_utf8(content, path, 0).removeprefix("\ufeff")
    try:
        records = _parse_json(text)
    except (ValueError, RecursionError) as error:
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        cause = _describe_json_error(error)
        raise DataError(
            f"{place}: not valid JSON ({cause}); the file must be an array of objects, or JSON Lines"
        ) from error
    assert isinstance(records, list)
    return records


def _parse_json(text: str) -> Any:
    return json.loads(text, parse_int=_parse_integer)


def _parse_integer(digits: str) -> int | float:
    """Return an infinite float if an integer has more digits than Python converts to an ``int``."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Return whether a text ends inside a JSON value: between two tokens, or in a string, an escape or a word."""
    rest = text[error.pos :]
    return (
        error.msg.startswith("Unterminated string")
        or (error.msg.startswith("Invalid \\uXXXX escape") and len(rest) < len("uXXXX"))
        or any(word.startswith(rest) for word in ("true", "false", "null"))
    )


def _describe_json_error(error: ValueError | RecursionError) -> str:
    """Return the reason and the column of an error. The caller must name the line."""
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: {error.msg}"
    return "too many nested lists or objects" if isinstance(error, RecursionError) else str(error)

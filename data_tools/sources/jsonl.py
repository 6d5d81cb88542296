"""JSON Lines: one object a line, compressed or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import orjson

from data_tools.errors import DataError
from data_tools.sources.files import compression_of, decode_utf8, list_files, open_decompressed
from data_tools.sources.slices import Slice

JSONL_SUFFIXES = tuple(
    name + compression for name in (".jsonl", ".ndjson", ".json") for compression in ("", ".gz", ".zst")
)
_READ_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonlSource:
    """Files with a JSON object a line, one string field of which is the document."""

    def __init__(self, inputs: Sequence[str], text_field: str) -> None:
        """List the files.

        Raises:
            DataError: an input does not exist.
        """
        self._files = list_files(inputs, JSONL_SUFFIXES)
        self._text_field = text_field

    def options(self) -> dict[str, Any]:
        return {**self._files.options(), "text_field": self._text_field}

    def text_bytes(self) -> int:
        return self._files.text_bytes()

    def slices(self, slice_bytes: int) -> list[Slice]:
        return self._files.cut(slice_bytes)

    def read(self, part: Slice) -> Iterator[str]:
        for line in read_lines(part):
            record = line.parse()
            text = record.get(self._text_field)
            yield text if type(text) is str else text_of_record(record, self._text_field, line.place())


class Line:
    """One line of a file, and where it stands."""

    __slots__ = ("content", "offset", "path")

    def __init__(self, path: str, offset: int, content: bytes) -> None:
        self.path = path
        self.offset = offset  # in the decompressed file
        self.content = content

    def parse(self) -> dict[str, Any]:
        """Its JSON object.

        Raises:
            DataError: it is no UTF-8, no JSON, or no object; names the place.
        """
        try:
            record = orjson.loads(self.content)
        except orjson.JSONDecodeError:
            record = self._parse_leniently()
        if not isinstance(record, dict):
            raise DataError(f"{self.place()}: holds a {type(record).__name__}; each line must be one JSON object")
        return record

    def place(self) -> str:
        """The file and the number of the line, found by counting."""
        number, left = 1, self.offset
        with open_decompressed(self.path) as file:
            while left and (content := file.read(min(left, _READ_BYTES))):
                number += content.count(b"\n")
                left -= len(content)
        return f"{self.path}:{number}"

    def _parse_leniently(self) -> Any:
        """What the standard library reads and orjson does not: lone surrogates, NaN; or the error, in detail."""
        text = decode_utf8(self.content, self.path, self.offset)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.place()}: not valid JSON ({error}); each line must be one JSON object") from error


def read_lines(part: Slice) -> Iterator[Line]:
    """The lines that begin in a range of bytes, blank ones and a byte order mark left out."""
    with open_decompressed(part.path) as file:
        offset = part.start
        if offset:
            # A line that begins right at the range is its first one; one that began before is another's.
            file.seek(offset - 1)
            offset += _skip_line(file, part.stop - offset + 1) - 1
        to_the_end = compression_of(part.path) is not None  # never cut, and of unknown length
        while (to_the_end or offset < part.stop) and (line := file.readline()):
            content = line.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else line
            if content.strip():
                yield Line(part.path, offset + len(line) - len(content), content)
            offset += len(line)


def _skip_line(file: BinaryIO, at_least: int) -> int:
    """Read the rest of a line, in constant memory; of a long one no more than what was asked for. Bytes read."""
    skipped = 0
    while skipped < at_least and (piece := file.readline(_READ_BYTES)):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def text_of_record(record: dict[str, Any], text_field: str, place: str) -> str:
    """The document in a record.

    Raises:
        DataError: the field is missing or no string; names the place and the fields that are there.
    """
    if text_field not in record:
        names = ", ".join(map(str, record)) or "none"
        raise DataError(f"{place}: no field {text_field!r}; the fields are {names}; choose one with --text-field")
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field {text_field!r} is a {type(text).__name__}, it must be a string; "
            f"the fields are {', '.join(map(str, record))}"
        )
    return text

"""Read documents from JSON Lines, files with one JSON object per line. The files may be compressed."""

import codecs
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from data_tools.errors import DataError, json_type, list_names
from data_tools.sources.files import READ_BYTES, FileSource, Slice, compression_of, decode_utf8, open_decompressed
from data_tools.storage.content import describe_content

JSONL_SUFFIXES = tuple(
    name + compression for name in (".jsonl", ".ndjson", ".json") for compression in ("", ".gz", ".zst")
)


class JsonlSource(FileSource):
    """Files with one JSON object per line, of which one string field is the document."""

    def __init__(self, inputs: Sequence[str], text_field: str) -> None:
        super().__init__(inputs, JSONL_SUFFIXES, text_field=text_field)
        self._text_field = text_field

    def read(self, piece: Slice) -> Iterator[str]:
        for line in read_lines(piece):
            yield text_of_record(line.parse(), self._text_field, line)


class Line(NamedTuple):
    """One line of a file and its offset in the decompressed file. As a string it is ``<file>:<line number>``."""

    path: str
    offset: int
    content: bytes

    def __str__(self) -> str:
        number, left = 1, self.offset
        with open_decompressed(self.path) as file:
            while left and (content := file.read(min(left, READ_BYTES))):
                number += content.count(b"\n")
                left -= len(content)
        return f"{self.path}:{number}"

    def parse(self) -> dict[str, Any]:
        """Return the line's JSON object.

        Raises:
            DataError: the line is not UTF-8, not JSON, or not an object.
        """
        try:
            record = orjson.loads(self.content)
        except orjson.JSONDecodeError:
            # The standard library also reads lone surrogates and NaN, and explains errors better.
            text = decode_utf8(self.content, self.path, self.offset)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                if found := describe_content(self.path, compression_of(self.path)):
                    raise DataError(f"{self.path} {found}") from error
                raise DataError(f"{self}: not valid JSON ({error}); each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise DataError(f"{self}: holds {json_type(record)}; each line must be one JSON object")
        return record


def read_lines(piece: Slice) -> Iterator[Line]:
    """Yield the lines that begin in a range of bytes. Blank lines and a byte order mark are skipped."""
    with open_decompressed(piece.path) as file:
        offset = piece.start
        if offset:
            # The previous slice reads a line that crosses the start, but not a line that begins exactly at the start.
            offset = file.seek(offset - 1)
            while offset < piece.stop and (content := file.readline(READ_BYTES)):  # a long line takes constant memory
                offset += len(content)
                if content.endswith(b"\n"):
                    break
        # A compressed file is one slice, and the number of its decompressed bytes is not known.
        stop = math.inf if compression_of(piece.path) else piece.stop
        while offset < stop and (line := file.readline()):
            content = line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
            if content.strip():
                yield Line(piece.path, offset + len(line) - len(content), content)
            offset += len(line)


def text_of_record(record: dict[str, Any], text_field: str, place: object) -> str:
    """Return the document in a JSON object or in a row of a dataset.

    Raises:
        DataError: the field is missing or not a string. ``place``, as a string, names the record in the message.
    """
    if text_field not in record:
        names = list_names(record)
        raise DataError(f"{place}: no field {text_field!r}; the fields are {names}; choose one with --text-field")
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field {text_field!r} is {json_type(text)}, it must be a string; "
            f"the fields are {list_names(record)}"
        )
    return text

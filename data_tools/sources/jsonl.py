"""JSON Lines: one object a line, compressed or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from data_tools.errors import DataError
from data_tools.sources.files import decode_utf8, list_files, open_decompressed

_SUFFIXES = tuple(name + compression for name in (".jsonl", ".ndjson", ".json") for compression in ("", ".gz", ".zst"))
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonlSource:
    """Files with a JSON object a line, one string field of which is the document."""

    def __init__(self, inputs: Sequence[str], text_field: str) -> None:
        """List the files.

        Raises:
            DataError: an input does not exist.
        """
        self._files = list_files(inputs, _SUFFIXES)
        self._text_field = text_field

    def options(self) -> dict[str, Any]:
        return {**self._files.options(), "text_field": self._text_field}

    def documents(self) -> Iterator[str]:
        for path in self._files.paths():
            with open_decompressed(path) as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                    if content.strip():
                        text = decode_utf8(content, path, offset + len(line) - len(content))
                        yield _text_of_line(text, self._text_field, f"{path}:{number}")
                    offset += len(line)


def _text_of_line(line: str, text_field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: holds a {type(record).__name__}; each line must be one JSON object")
    return text_of_record(record, text_field, place)


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

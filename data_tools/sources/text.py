"""Plain text files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import DataError
from data_tools.sources.files import decode_utf8, list_files, open_decompressed

_READ_BYTES = 1 << 20


class TextSource:
    """UTF-8 files; a file is a document, or several with a separator between them.

    Bytes are taken as they are: no newline is translated, nothing is stripped.
    """

    def __init__(self, inputs: Sequence[str], document_separator: str | None) -> None:
        """List the files.

        Raises:
            DataError: an input does not exist, or the separator is empty or no text.
        """
        self._separator = _encode_separator(document_separator)
        self._document_separator = document_separator
        self._files = list_files(inputs, suffixes=())

    def options(self) -> dict[str, Any]:
        return {**self._files.options(), "document_separator": self._document_separator}

    def documents(self) -> Iterator[str]:
        for path in self._files.paths():
            for offset, content in _pieces(path, self._separator):
                yield decode_utf8(content, path, offset)


def _encode_separator(separator: str | None) -> bytes | None:
    if separator is None:
        return None
    try:
        encoded = separator.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"--document-separator {separator!a} is not valid UTF-8") from error
    if not encoded:
        raise DataError("--document-separator is empty; it must be at least one character")
    return encoded


def _pieces(path: Path, separator: bytes | None) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each document of a file, holding no more than one document and one read.

    Cutting bytes is cutting text: in UTF-8 no character's bytes occur inside another's.
    """
    with open_decompressed(path) as file:
        if separator is None:
            yield 0, file.read()
            return
        offset, rest = 0, bytearray()
        while chunk := file.read(_READ_BYTES):
            # A separator may straddle two reads, so the search resumes a little before the new bytes.
            search_from = max(0, len(rest) - len(separator) + 1)
            rest += chunk
            start = 0
            while (end := rest.find(separator, search_from)) >= 0:
                yield offset + start, bytes(rest[start:end])
                start = search_from = end + len(separator)
            del rest[:start]
            offset += start
        yield offset, bytes(rest)

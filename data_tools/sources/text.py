"""Plain text files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from data_tools.errors import DataError
from data_tools.sources.files import compression_of, decode_utf8, group_files, list_files, open_decompressed
from data_tools.sources.slices import Slice

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

    def text_bytes(self) -> int:
        return self._files.text_bytes()

    def slices(self, slice_bytes: int) -> list[Slice]:
        if self._separator is not None:
            return self._files.cut(slice_bytes)
        return group_files(self._files.files, slice_bytes)

    def read(self, part: Slice) -> Iterator[str]:
        if self._separator is not None:
            for offset, content in _pieces_of_range(part, self._separator):
                yield decode_utf8(content, part.path, offset)
            return
        for path, _ in self._files.files[part.start : part.stop]:
            with open_decompressed(path) as file:
                content = file.read()
            yield decode_utf8(content, path, 0)


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


def _pieces_of_range(part: Slice, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """The documents that begin in a range of bytes; ranges that follow each other have each document once."""
    if compression_of(part.path) is not None:  # never cut, and of unknown length
        yield from _pieces(part.path, separator)
        return
    start = part.start and _first_beginning(part, separator)
    if start >= part.stop:
        return
    for offset, content in _pieces(part.path, separator, start):
        if offset >= part.stop:
            return
        yield offset, content


def _first_beginning(part: Slice, separator: bytes) -> int:
    """Where the first document begins in or behind a range, or the range's end; in constant memory."""
    with open_decompressed(part.path) as file:
        position = _search_from(file, max(0, part.start - len(separator)), separator)
        file.seek(position)
        rest = b""
        while position < part.stop and (chunk := file.read(_READ_BYTES)):
            rest += chunk
            searched = 0
            while (found := rest.find(separator, searched)) >= 0:
                searched = found + len(separator)
                if position + searched >= part.start:
                    return position + searched
            searched = max(searched, len(rest) - len(separator) + 1)  # a separator may straddle two reads
            position += searched
            rest = rest[searched:]
    return part.stop


def _search_from(file: BinaryIO, position: int, separator: bytes) -> int:
    """The last place up to ``position`` over which no separator reaches.

    A search from there finds what one from the file's beginning does, also where separators could overlap.
    """
    overlap = len(separator) - 1
    while position > 0:
        begin = max(0, position - _READ_BYTES - overlap)
        file.seek(begin)
        window = file.read(position - begin + overlap)
        earliest = begin + overlap if begin else 0  # before it the window does not show all that reaches over
        while position >= earliest:
            at = position - begin
            found = window.rfind(separator, max(0, at - overlap), at + overlap)
            if found < 0:
                return position
            position = begin + found
    return 0


def _pieces(path: str, separator: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of what lies between separators from ``start`` on, holding one piece and one read.

    Cutting bytes is cutting text: in UTF-8 no character's bytes occur inside another's.
    """
    with open_decompressed(path) as file:
        if start:
            file.seek(start)
        offset, rest = start, bytearray()
        while chunk := file.read(_READ_BYTES):
            # A separator may straddle two reads, so the search resumes a little before the new bytes.
            search_from = max(0, len(rest) - len(separator) + 1)
            rest += chunk
            piece = 0
            while (end := rest.find(separator, search_from)) >= 0:
                yield offset + piece, bytes(rest[piece:end])
                piece = search_from = end + len(separator)
            del rest[:piece]
            offset += piece
        yield offset, bytes(rest)

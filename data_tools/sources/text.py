"""Plain text files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

from data_tools.errors import DataError
from data_tools.sources.files import FileSource, Slice, group_files
from data_tools.sources.reading import READ_BYTES, compression_of, decode_utf8, open_decompressed


class TextSource(FileSource):
    """UTF-8 files, each of which is one document, or several with a separator between them.

    Bytes are taken as they are: no newline is translated, nothing is stripped.
    """

    def __init__(self, inputs: Sequence[str], document_separator: str | None) -> None:
        """Find the files.

        Raises:
            DataError: an input does not exist, or the separator is empty or not valid Unicode.
        """
        self._separator = _encode_separator(document_separator)
        super().__init__(inputs, suffixes=(), document_separator=document_separator)

    def slices(self, slice_bytes: int) -> list[Slice]:
        """Return ranges of bytes if there is a separator, otherwise ranges of whole files."""
        return group_files(self.files, slice_bytes) if self._separator is None else super().slices(slice_bytes)

    def read(self, piece: Slice) -> Iterator[str]:
        if self._separator is not None:
            for offset, content in _documents_of_range(piece, self._separator):
                yield decode_utf8(content, piece.path, offset)
            return
        for path, _ in self.files[piece.start : piece.stop]:
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


def _documents_of_range(piece: Slice, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of the documents that begin in a range of bytes.

    Consecutive ranges yield each document once.
    """
    if compression_of(piece.path) is not None:  # one slice of unknown length
        yield from _split(piece.path, separator)
        return
    start = piece.start and _first_beginning(piece, separator)
    if start >= piece.stop:
        return
    for offset, content in _split(piece.path, separator, start):
        if offset >= piece.stop:
            return
        yield offset, content


def _first_beginning(piece: Slice, separator: bytes) -> int:
    """Return where the first document begins in or after a range, or the range's end, in constant memory."""
    with open_decompressed(piece.path) as file:
        position = _safe_search_start(file, max(0, piece.start - len(separator)), separator)
        file.seek(position)
        rest = b""
        while position < piece.stop and (content := file.read(READ_BYTES)):
            rest += content
            searched = 0
            while (found := rest.find(separator, searched)) >= 0:
                searched = found + len(separator)
                if position + searched >= piece.start:
                    return position + searched
            searched = max(searched, len(rest) - len(separator) + 1)  # a separator may straddle two reads
            position += searched
            rest = rest[searched:]
    return piece.stop


def _safe_search_start(file: BinaryIO, position: int, separator: bytes) -> int:
    """Return the last offset up to ``position`` that lies inside no separator.

    A search from there finds the same separators as a search from the beginning of the file, even if separators can
    overlap.
    """
    overlap = len(separator) - 1
    while position > 0:
        begin = max(0, position - READ_BYTES - overlap)
        file.seek(begin)
        window = file.read(position - begin + overlap)
        earliest = begin + overlap if begin else 0  # separators around earlier offsets may begin before the window
        while position >= earliest:
            at = position - begin
            found = window.rfind(separator, max(0, at - overlap), at + overlap)
            if found < 0:
                return position
            position = begin + found
    return 0


def _split(path: str, separator: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of what is between separators from ``start`` on.

    Holds one document and one read in memory. Splitting bytes is the same as splitting text, because the bytes of a
    UTF-8 character never occur inside another one.
    """
    with open_decompressed(path) as file:
        if start:
            file.seek(start)
        offset, rest = start, bytearray()
        while content := file.read(READ_BYTES):
            # A separator may straddle two reads, so the search resumes a little before the new bytes.
            search_from = max(0, len(rest) - len(separator) + 1)
            rest += content
            begin = 0
            while (end := rest.find(separator, search_from)) >= 0:
                yield offset + begin, bytes(rest[begin:end])
                begin = search_from = end + len(separator)
            del rest[:begin]
            offset += begin
        yield offset, bytes(rest)

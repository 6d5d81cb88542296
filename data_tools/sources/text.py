"""Read documents from plain text files."""

import math
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from data_tools.errors import DataError
from data_tools.sources.files import (
    READ_BYTES,
    FileSource,
    Slice,
    compression_of,
    decode_utf8,
    group_files,
    open_decompressed,
)
from data_tools.sources.rows import BadRowError, OnBadRow, parse_rows, stop_at_bad_row
from data_tools.storage.content import begins_as, describe_decoded
from data_tools.storage.files import is_remote

# After a crash, the end of a file can consist of zeros, which are valid UTF-8. A disk writes sectors of at least 512
# bytes. A text may end in fewer zeros.
_ZEROS_OF_A_CRASH = bytes(512)
_JSON_LINES = (".jsonl", ".ndjson")
_MAX_HEADS = 1000  # the number of files that are opened before the work starts, to look for HTML


class TextSource(FileSource):
    """Text files in UTF-8. Each file is one document. ``--document-separator`` can divide a file into documents."""

    def __init__(self, inputs: Sequence[str], document_separator: str | None) -> None:
        if document_separator == "":
            raise DataError("--document-separator is empty; it must be at least one character")
        try:
            self._separator = None if document_separator is None else document_separator.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"--document-separator {document_separator!a} is not valid UTF-8") from error
        super().__init__(inputs, suffixes=(), document_separator=document_separator)

    def slices(self, slice_bytes: int) -> list[Slice]:
        """Divide the input files into slices for the workers.

        With ``--document-separator``, a slice is a range of bytes in a file. Otherwise, a slice is a group of files.
        """
        return group_files(self.files, slice_bytes) if self._separator is None else super().slices(slice_bytes)

    def read(self, source_slice: Slice, on_bad_row: OnBadRow = stop_at_bad_row) -> Iterator[str]:
        return parse_rows(self._read_bytes(source_slice), lambda row: _decode_text(*row), on_bad_row)

    def notices(self) -> list[str]:
        """Return messages: how many files are JSON lines, and how many of the first local files are HTML pages."""
        return [*self._notices_of_json(), *self._notices_of_pages()]

    def _notices_of_json(self) -> list[str]:
        found = [path for path, _ in self.files if path.removesuffix(".gz").removesuffix(".zst").endswith(_JSON_LINES)]
        if not found:
            return []
        return [
            f"{len(found):,} of {len(self.files):,} files are named as JSON lines, such as {found[0]}: the keys and "
            "quotes of their records are tokenized as text; if you do not want this, use --source jsonl"
        ]

    def _notices_of_pages(self) -> list[str]:
        local = [path for path, _ in self.files if not is_remote(path)][:_MAX_HEADS]
        pages = [path for path in local if begins_as(path, "html")]
        if not pages:
            return []
        return [
            f"{len(pages):,} of {len(local):,} files begin as HTML pages, such as {pages[0]}: their tags are tokenized "
            "as text; if you do not want this, extract the text of the pages first"
        ]

    def _is_read_whole(self, path: str) -> bool:
        return self._separator is None

    def _read_bytes(self, source_slice: Slice) -> Iterator[tuple[bytes, str, int]]:
        """Yield bytes, file and offset of each document that begins in the slice."""
        if self._separator is None:
            for path, _ in self.files[source_slice.start : source_slice.stop]:
                with open_decompressed(path) as file:
                    content = file.read()
                yield content, path, 0
            return
        # A compressed file is one slice, and the number of its decompressed bytes is not known.
        stop = math.inf if compression_of(source_slice.path) else source_slice.stop
        start = source_slice.start and _first_beginning(source_slice, self._separator)
        if start >= stop:
            return
        for offset, content in _split(source_slice.path, self._separator, start):
            if offset >= stop:
                return
            yield content, source_slice.path, offset


def _decode_text(content: bytes, path: str, offset: int) -> str:
    """Decode a document without a byte order mark.

    Raise BadRowError if the document is not UTF-8 or ends in zeros, or if the file is a tar archive or in UTF-16.
    """
    if offset == 0 and content and (found := describe_decoded(content)):
        raise BadRowError(f"{path} {found}")
    if content.endswith(_ZEROS_OF_A_CRASH):
        raise BadRowError(
            f"{path}: the document at byte {offset} ends in zeros, as after an interrupted copy; copy or download the "
            "file again"
        )
    text = decode_utf8(content, path, offset)
    return text if offset else text.removeprefix("\ufeff")


def _first_beginning(source_slice: Slice, separator: bytes) -> int:
    """Return the offset of the first document that begins in a range, or the end of the range."""
    with open_decompressed(source_slice.path) as file:
        position = _safe_search_start(file, max(0, source_slice.start - len(separator)), separator)
        file.seek(position)
        rest = b""
        while position < source_slice.stop and (content := file.read(READ_BYTES)):
            rest += content
            searched = 0
            while (found := rest.find(separator, searched)) >= 0:
                searched = found + len(separator)
                if position + searched >= source_slice.start:
                    return position + searched
            searched = max(searched, len(rest) - len(separator) + 1)  # a separator may straddle two reads
            position += searched
            rest = rest[searched:]
    return source_slice.stop


def _safe_search_start(file: BinaryIO, position: int, separator: bytes) -> int:
    """Return the last offset up to ``position`` that is not inside a separator.

    Separators can overlap. A search for separators from this offset has the same result as a search of the whole file.
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


def _split(path: str, separator: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the bytes of each document from ``start`` on."""
    with open_decompressed(path) as file:
        if start:  # never for compressed files, which cannot seek
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

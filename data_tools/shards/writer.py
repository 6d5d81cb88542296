"""Writing shards: streamed to a temporary name in constant memory, fsynced, then named."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa

from data_tools.arrays import TokenArray
from data_tools.shards.manifest import ShardRecord
from data_tools.storage import one_line_write_errors, publish, sha256_of_file, temporary_path

BATCH_TOKENS = 1 << 20
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEADER_BYTES = 128


class TokenFile(Protocol):
    """How one file format lays out tokens that arrive in batches."""

    def write(self, tokens: TokenArray) -> None:
        """Add a batch of tokens."""
        ...

    def finish(self) -> None:
        """Write what the format needs once the count is known."""
        ...


class NpyTokenFile:
    """A one-dimensional little-endian uint16 ``.npy`` file, its header filled in at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._tokens = 0
        file.write(_npy_header(0))

    def write(self, tokens: TokenArray) -> None:
        self._file.write(tokens.astype("<u2", copy=False).data)
        self._tokens += tokens.size

    def finish(self) -> None:
        self._file.seek(0)
        self._file.write(_npy_header(self._tokens))


class ArrowTokenFile:
    """An Arrow IPC stream with one uint16 column ``tokens``, as ``datasets.Dataset.from_file`` maps it."""

    def __init__(self, file: BinaryIO) -> None:
        self._schema = pa.schema([pa.field("tokens", pa.uint16(), nullable=False)])
        self._stream = pa.ipc.new_stream(file, self._schema)

    def write(self, tokens: TokenArray) -> None:
        self._stream.write_batch(pa.record_batch([pa.array(tokens)], schema=self._schema))

    def finish(self) -> None:
        self._stream.close()


SHARD_FORMATS: dict[str, Callable[[BinaryIO], TokenFile]] = {"npy": NpyTokenFile, "arrow": ArrowTokenFile}


class ShardWriter:
    """One shard on its way to the disk. Call ``close`` when it is whole, ``abort`` when it will not be."""

    def __init__(self, folder: Path, file: str, split: str) -> None:
        """Open ``folder/file`` for writing; its suffix names the format.

        Raises:
            DataError: the file cannot be created, for the reason given.
        """
        self.tokens = 0
        self._documents = 0
        self._utf8_bytes = 0
        self._split = split
        self._path = folder / file
        self._temporary = temporary_path(self._path)
        self._batch = np.empty(BATCH_TOKENS, dtype=np.uint16)
        self._batch_size = 0
        with one_line_write_errors(self._path):
            self._file = open(self._temporary, "wb")  # noqa: SIM115 (open as long as the writer)
            try:
                self._format = SHARD_FORMATS[self._path.suffix[1:]](self._file)
            except BaseException:
                self.abort()
                raise

    def append(self, tokens: TokenArray, *, documents: int, utf8_bytes: int) -> None:
        """Add whole documents.

        Args:
            tokens: uint16 of shape (tokens,), ``END_OF_TEXT`` before each document.
            documents: how many there are.
            utf8_bytes: bytes of their text.

        Raises:
            DataError: the disk is full or otherwise refuses, with the reason.
        """
        self.tokens += tokens.size
        self._documents += documents
        self._utf8_bytes += utf8_bytes
        # Batches of one fixed size, so that the file does not depend on how documents were grouped.
        while tokens.size:
            room = BATCH_TOKENS - self._batch_size
            piece, tokens = tokens[:room], tokens[room:]
            self._batch[self._batch_size : self._batch_size + piece.size] = piece
            self._batch_size += piece.size
            if self._batch_size == BATCH_TOKENS:
                self._write_batch()

    def close(self) -> ShardRecord:
        """Put the shard on the disk under its name.

        Raises:
            DataError: the disk is full or otherwise refuses, with the reason.
        """
        if self._batch_size:
            self._write_batch()
        with one_line_write_errors(self._path):
            self._format.finish()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            sha256 = sha256_of_file(self._temporary)
            publish(self._temporary, self._path)
        return ShardRecord(
            file=self._path.name,
            split=self._split,
            tokens=self.tokens,
            documents=self._documents,
            utf8_bytes=self._utf8_bytes,
            sha256=sha256,
        )

    def abort(self) -> None:
        """Remove what was written so far."""
        # Closing tries once more to bring buffered bytes to a disk that may be full; the file goes anyway.
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write_batch(self) -> None:
        with one_line_write_errors(self._path):
            self._format.write(self._batch[: self._batch_size])
        self._batch_size = 0


def _npy_header(tokens: int) -> bytes:
    """Version 1.0 of the format (numpy.lib.format), padded to a size that fits any count."""
    fields = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({tokens},), }}"
    body_bytes = _NPY_HEADER_BYTES - len(_NPY_MAGIC) - 2
    body = fields.encode("ascii").ljust(body_bytes - 1) + b"\n"
    return _NPY_MAGIC + body_bytes.to_bytes(2, "little") + body

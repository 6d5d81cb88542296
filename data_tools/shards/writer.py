"""Writing shards: streamed to a temporary name in constant memory, fsynced, then named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.arrays import MaskArray, TokenArray, as_arrow
from data_tools.errors import one_line_write_errors
from data_tools.shards.llmc import LLMC_SUFFIX, LlmcTokenFile
from data_tools.shards.manifest import ShardRecord, mask_file_of
from data_tools.storage.atomic import PendingFile
from data_tools.storage.files import sha256_of_file

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


class NpyFile:
    """A one-dimensional ``.npy`` file, its header filled in at the end; of tokens: little-endian uint16."""

    def __init__(self, file: BinaryIO, descr: str = "<u2") -> None:
        self._file = file
        self._descr = descr
        self._size = 0
        file.write(_npy_header(0, descr))

    def write(self, values: npt.NDArray[Any]) -> None:
        self._file.write(values.astype(self._descr, copy=False).data)
        self._size += values.size

    def finish(self) -> None:
        self._file.seek(0)
        self._file.write(_npy_header(self._size, self._descr))


class ArrowTokenFile:
    """An Arrow IPC stream with one uint16 column ``tokens``, as ``datasets.Dataset.from_file`` maps it."""

    def __init__(self, file: BinaryIO) -> None:
        self._schema = pa.schema([pa.field("tokens", pa.uint16(), nullable=False)])
        self._stream = pa.ipc.new_stream(file, self._schema)

    def write(self, tokens: TokenArray) -> None:
        self._stream.write_batch(pa.record_batch([as_arrow(tokens)], schema=self._schema))

    def finish(self) -> None:
        self._stream.close()


# What stage 1 writes.
SHARD_FORMATS: dict[str, Callable[[BinaryIO], TokenFile]] = {"npy": NpyFile, "arrow": ArrowTokenFile}
_BY_SUFFIX: dict[str, Callable[[BinaryIO], TokenFile]] = {**SHARD_FORMATS, LLMC_SUFFIX[1:]: LlmcTokenFile}


class _ShardFile:
    """A file in one of the formats, under its aside path until it is published. Write errors become ``DataError``."""

    def __init__(self, path: Path, open_format: Callable[[BinaryIO], TokenFile]) -> None:
        self._path = path
        with one_line_write_errors(path):
            self._pending = PendingFile(path)
            try:
                self._format = open_format(self._pending.file)
            except BaseException:
                self._pending.discard()
                raise

    def write(self, values: npt.NDArray[Any]) -> None:
        with one_line_write_errors(self._path):
            self._format.write(values)

    def complete(self) -> str:
        """Write everything to the disk and return the file's SHA-256."""
        with one_line_write_errors(self._path):
            self._format.finish()
            self._pending.complete()
            return sha256_of_file(self._pending.aside)

    def publish(self) -> None:
        with one_line_write_errors(self._path):
            self._pending.publish()

    def discard(self) -> None:
        self._pending.discard()


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
        self._mask_path = folder / mask_file_of(file)
        self._batch = np.empty(BATCH_TOKENS, dtype=np.uint16)
        self._batch_size = 0
        self._shard = _ShardFile(self._path, _BY_SUFFIX[self._path.suffix[1:]])
        self._mask: _ShardFile | None = None

    def append(self, tokens: TokenArray, *, documents: int, utf8_bytes: int, scored: MaskArray | None = None) -> None:
        """Add whole documents.

        Args:
            tokens: uint16 of shape (tokens,), ``END_OF_TEXT`` before each document.
            documents: how many there are.
            utf8_bytes: bytes of their text.
            scored: bool of shape (tokens,), which tokens are scored as targets. Given with the first documents of
                a shard, and then with all, it becomes the shard's mask; None: there is none, all are scored.

        Raises:
            DataError: the disk is full or otherwise refuses, with the reason.
        """
        self._append_mask(tokens, scored)
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

    def _append_mask(self, tokens: TokenArray, scored: MaskArray | None) -> None:
        if scored is not None and self.tokens == 0 and self._mask is None:
            self._mask = _ShardFile(self._mask_path, lambda file: NpyFile(file, "|u1"))
        assert (scored is None) == (self._mask is None), f"{self._path}: all of a shard has a mask, or nothing"
        if self._mask and scored is not None:
            assert scored.shape == tokens.shape, f"{self._path}: a mask has one flag a token"
            self._mask.write(scored.astype(np.bool_, copy=False).view(np.uint8))

    def close(self) -> ShardRecord:
        """Put the shard on the disk under its name, its mask before it.

        Raises:
            DataError: the disk is full or otherwise refuses, with the reason.
        """
        if self._batch_size:
            self._write_batch()
        mask_sha256 = self._mask.complete() if self._mask else None
        sha256 = self._shard.complete()
        if self._mask:
            self._mask.publish()
        self._shard.publish()
        return ShardRecord(
            file=self._path.name,
            split=self._split,
            tokens=self.tokens,
            documents=self._documents,
            utf8_bytes=self._utf8_bytes,
            sha256=sha256,
            mask_sha256=mask_sha256,
        )

    def abort(self) -> None:
        """Remove what was written so far."""
        self._shard.discard()
        if self._mask:
            self._mask.discard()

    def _write_batch(self) -> None:
        self._shard.write(self._batch[: self._batch_size])
        self._batch_size = 0


def _npy_header(size: int, descr: str) -> bytes:
    """Version 1.0 of the format (numpy.lib.format), padded to a size that fits any count."""
    fields = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({size},), }}"
    body_bytes = _NPY_HEADER_BYTES - len(_NPY_MAGIC) - 2
    body = fields.encode("ascii").ljust(body_bytes - 1) + b"\n"
    return _NPY_MAGIC + body_bytes.to_bytes(2, "little") + body

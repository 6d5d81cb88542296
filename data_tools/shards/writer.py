"""Write token shards in constant memory. A shard gets its final name only when it is complete.

The caller must fsync the files when it moves them into the output folder.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.arrays import MaskArray, TokenArray, as_arrow
from data_tools.errors import one_line_write_errors
from data_tools.shards.llmc import LLMC_SUFFIX, llmc_header
from data_tools.shards.manifest import ShardRecord, mask_file_of
from data_tools.storage.atomic import atomic_file
from data_tools.storage.sha256 import sha256_of_file

BATCH_TOKENS = 1 << 20
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEADER_BYTES = 128


WriteValues = Callable[[npt.NDArray[Any]], None]
#: Opens a file in one format. The ``with`` block writes batches. After the block, the file is complete.
OpenFormat = Callable[[BinaryIO], AbstractContextManager[WriteValues]]


@contextmanager
def write_flat(file: BinaryIO, header: Callable[[int], bytes], dtype: str = "<u2") -> Iterator[WriteValues]:
    """Return a context manager for writing a file that consists of a header and values of one dtype.

    The ``with`` block gets a function that appends values.

    Args:
        header: takes the number of values, and returns the header. All headers must have the same length, because the
            header is written before the values, and replaced after the block.
    """
    size = 0

    def write(values: npt.NDArray[Any]) -> None:
        nonlocal size
        file.write(values.astype(dtype, copy=False).data)
        size += values.size

    file.write(header(0))
    yield write
    file.seek(0)
    file.write(header(size))


@contextmanager
def _write_arrow(file: BinaryIO) -> Iterator[WriteValues]:
    """Write an Arrow IPC stream with one uint16 column ``tokens``, which ``datasets.Dataset.from_file`` can map."""
    schema = pa.schema([pa.field("tokens", pa.uint16(), nullable=False)])
    stream = pa.ipc.new_stream(file, schema)
    yield lambda tokens: stream.write_batch(pa.record_batch([as_arrow(tokens)], schema=schema))
    stream.close()


def _npy_header(size: int, descr: str = "<u2") -> bytes:
    """Return a header of version 1.0 (``numpy.lib.format``). Its length does not depend on ``size``."""
    fields = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({size},), }}"
    body_bytes = _NPY_HEADER_BYTES - len(_NPY_MAGIC) - 2
    body = fields.encode("ascii").ljust(body_bytes - 1) + b"\n"
    return _NPY_MAGIC + body_bytes.to_bytes(2, "little") + body


SHARD_FORMATS: dict[str, OpenFormat] = {"npy": partial(write_flat, header=_npy_header), "arrow": _write_arrow}
_MASK_FORMAT: OpenFormat = partial(write_flat, header=partial(_npy_header, descr="|u1"), dtype="|u1")
_BY_SUFFIX: dict[str, OpenFormat] = {**SHARD_FORMATS, LLMC_SUFFIX[1:]: partial(write_flat, header=llmc_header)}


@contextmanager
def _shard_file(path: Path, open_format: OpenFormat) -> Iterator[WriteValues]:
    with one_line_write_errors(path), atomic_file(path, durable=False) as file, open_format(file) as write:
        yield write


class ShardWriter:
    """A shard that is being written. Call ``close`` to complete it, or ``abort`` to remove its files."""

    def __init__(self, folder: Path, file: str, split: str, open_format: OpenFormat | None = None) -> None:
        """Open ``folder/file`` for writing. If ``open_format`` is None, the file's suffix determines the format."""
        self.tokens = 0
        self._documents = 0
        self._utf8_bytes = 0
        self._split = split
        self._path = folder / file
        self._mask_path = folder / mask_file_of(file)
        self._batch = np.empty(BATCH_TOKENS, dtype=np.uint16)
        self._batch_size = 0
        self._files = ExitStack()
        self._write_mask: WriteValues | None = None
        open_format = open_format or _BY_SUFFIX[self._path.suffix[1:]]
        self._write_tokens = self._files.enter_context(_shard_file(self._path, open_format))

    def append(self, tokens: TokenArray, *, documents: int, utf8_bytes: int, scored: MaskArray | None = None) -> None:
        """Append the tokens of whole documents.

        Args:
            tokens: uint16 of shape (tokens,), with ``END_OF_TEXT`` before each document.
            scored: the mask, bool of shape (tokens,), True for tokens that count in the loss. None means all tokens.
                Pass a mask in all calls for a shard, or in no call.
        """
        self._append_mask(tokens, scored)
        self.tokens += tokens.size
        self._documents += documents
        self._utf8_bytes += utf8_bytes
        # With batches of the same size, the bytes of the file do not depend on the sizes of ``tokens``.
        while (room := BATCH_TOKENS - self._batch_size) <= tokens.size:
            self._batch[self._batch_size :] = tokens[:room]
            tokens = tokens[room:]
            self._batch_size = BATCH_TOKENS
            self._write_batch()
        self._batch[self._batch_size : self._batch_size + tokens.size] = tokens
        self._batch_size += tokens.size

    def _append_mask(self, tokens: TokenArray, scored: MaskArray | None) -> None:
        if scored is not None and self.tokens == 0 and self._write_mask is None:
            self._write_mask = self._files.enter_context(_shard_file(self._mask_path, _MASK_FORMAT))
        assert (scored is None) == (self._write_mask is None), f"{self._path}: a shard has a mask, or none"
        if self._write_mask and scored is not None:
            assert scored.shape == tokens.shape, f"{self._path}: a mask has one flag per token"
            with one_line_write_errors(self._mask_path):
                self._write_mask(scored.astype(np.bool_, copy=False).view(np.uint8))

    def close(self) -> ShardRecord:
        """Complete the shard, and return its record. The mask file gets its final name before the token file."""
        if self._batch_size:
            self._write_batch()
        self._files.close()  # the mask's file first, because it was opened last
        return ShardRecord(
            file=self._path.name,
            split=self._split,
            tokens=self.tokens,
            documents=self._documents,
            utf8_bytes=self._utf8_bytes,
            sha256=sha256_of_file(self._path),
            mask_sha256=sha256_of_file(self._mask_path) if self._write_mask else None,
        )

    def abort(self) -> None:
        """Remove the unfinished files of the shard."""
        with suppress(_AbortedError), self._files:
            raise _AbortedError

    def _write_batch(self) -> None:
        with one_line_write_errors(self._path):
            self._write_tokens(self._batch[: self._batch_size])
        self._batch_size = 0


class _AbortedError(Exception):
    """Makes ``atomic_file`` delete the files of an aborted shard."""

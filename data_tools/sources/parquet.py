"""Read documents from Parquet files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import DataError, list_names
from data_tools.sources.files import FileSource, Slice, group_sizes, open_file

# Small enough to limit the memory for a batch of long documents, and large enough to make the cost per batch small.
_BATCH_ROWS = 512


class ParquetSource(FileSource):
    """Parquet files with one string column that contains the documents. A slice is a range of row groups."""

    def __init__(self, inputs: Sequence[str], text_field: str) -> None:
        super().__init__(inputs, (".parquet",), text_field=text_field)
        self._text_field = text_field

    def text_bytes(self) -> int:
        return sum(size for path, _ in self.files for size in self._row_group_bytes(path))

    def slices(self, slice_bytes: int) -> list[Slice]:
        return [
            Slice(path, start, stop, size)
            for path, _ in self.files
            for start, stop, size in group_sizes(self._row_group_bytes(path), slice_bytes)
        ]

    def read(self, piece: Slice) -> Iterator[str]:
        groups = range(piece.start, piece.stop)
        with _open_parquet(piece.path) as file:
            row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
            for batch in file.iter_batches(_BATCH_ROWS, groups, columns=[self._text_field], use_threads=False):
                yield from _texts_of(batch.column(0), piece.path, row, self._text_field)
                row += batch.num_rows

    def _row_group_bytes(self, path: str) -> list[int]:
        """Return the bytes of text in each row group."""
        with _open_parquet(path) as file:
            _check_column(file.schema_arrow, self._text_field, path)
            metadata = file.metadata
            column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == self._text_field)
            groups = range(metadata.num_row_groups)
            return [metadata.row_group(group).column(column).total_uncompressed_size for group in groups]


@contextmanager
def _open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    with open_file(path) as opened, pq.ParquetFile(opened) as file:
        yield file


def _texts_of(values: pa.Array, path: str, first_row: int, column: str) -> list[str]:
    """Return the strings of a batch. Raise DataError if a row has no string; the message names the first such row."""
    if values.null_count == 0:
        with suppress(UnicodeDecodeError):
            return list(values.to_pylist())
    texts = []
    for row, value in enumerate(values, start=first_row):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: row {row}: byte {error.start} of {column!r} is not valid UTF-8") from error
        if text is None:
            raise DataError(f"{path}: row {row}: column {column!r} is null, it must be a string")
        texts.append(text)
    return texts


def _check_column(schema: pa.Schema, column: str, path: str) -> None:
    if column not in schema.names:
        raise DataError(
            f"{path}: no column {column!r}; the columns are {list_names(schema.names)}; choose one with --text-field"
        )
    if schema.names.count(column) > 1:
        raise DataError(f"{path}: has several columns {column!r}; choose another one with --text-field")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{path}: column {column!r} holds {kind}, it must hold strings")

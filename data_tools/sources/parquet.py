"""Read documents from Parquet files."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import DataError, list_names
from data_tools.sources.files import FileSource, Slice, group_sizes, open_file
from data_tools.sources.rows import BadRowError, OnBadRow, parse_rows, stop_at_bad_row

# Limits the memory for a batch of long documents.
_BATCH_ROWS = 512


class ParquetSource(FileSource):
    """Parquet files with one string column of documents. Slices are ranges of row groups."""

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

    def read(self, source_slice: Slice, on_bad_row: OnBadRow = stop_at_bad_row) -> Iterator[str]:
        groups = range(source_slice.start, source_slice.stop)
        with _open_parquet(source_slice.path) as file:
            row = sum(file.metadata.row_group(group).num_rows for group in range(source_slice.start))
            for batch in file.iter_batches(_BATCH_ROWS, groups, columns=[self._text_field], use_threads=False):
                values = batch.column(self._text_field)  # for a.b, the batch also has a column a with a field b
                yield from _texts_of(values, f"{source_slice.path}: row", row, self._text_field, on_bad_row)
                row += batch.num_rows

    def _row_group_bytes(self, path: str) -> list[int]:
        with _open_parquet(path) as file:
            _check_column(file.schema_arrow, self._text_field, path)
            metadata = file.metadata
            column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == self._text_field)
            groups = range(metadata.num_row_groups)
            return [metadata.row_group(group).column(column).total_uncompressed_size for group in groups]


@contextmanager
def _open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    # Some writers, such as parquet-java and DuckDB, add checksums to the pages. Arrow ignores them by default.
    with open_file(path) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
        yield file


def _texts_of(values: pa.Array, place: str, first_row: int, column: str, on_bad_row: OnBadRow) -> Iterable[str]:
    """Return the strings of a batch. ``on_bad_row`` receives the rows without a valid string."""
    if values.null_count == 0:
        with suppress(UnicodeDecodeError):
            return list(values.to_pylist())

    def parse(numbered: tuple[int, pa.Scalar]) -> str:
        row, value = numbered
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise BadRowError(f"{place} {row}", f"byte {error.start} of {column!r} is not valid UTF-8") from error
        if text is None:
            raise BadRowError(f"{place} {row}", f"column {column!r} is null, it must be a string")
        return str(text)

    return parse_rows(enumerate(values, start=first_row), parse, on_bad_row)


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
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise DataError(
            f"{path}: column {column!r} holds {kind}, it must hold strings; choose another one with --text-field, or "
            "write the texts into a column of strings"
        )

"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import DataError
from data_tools.sources.files import list_files, one_line_read_errors

# Few enough that a batch of long documents stays small, enough to make the cost per batch vanish.
_BATCH_ROWS = 512


class ParquetSource:
    """Parquet files, one string column of which holds the documents."""

    def __init__(self, inputs: Sequence[str], text_field: str) -> None:
        """List the files.

        Raises:
            DataError: an input does not exist.
        """
        self._files = list_files(inputs, (".parquet",))
        self._text_field = text_field

    def options(self) -> dict[str, Any]:
        return {**self._files.options(), "text_field": self._text_field}

    def documents(self) -> Iterator[str]:
        for path in self._files.paths():
            with one_line_read_errors(path), pq.ParquetFile(path) as file:
                _check_column(file.schema_arrow, self._text_field, path)
                row = 0
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[self._text_field]):
                    for value in batch.column(0):
                        yield _text_of_value(value, f"{path}: row {row}", self._text_field)
                        row += 1


def _check_column(schema: pa.Schema, column: str, path: Path) -> None:
    if column not in schema.names:
        raise DataError(
            f"{path}: no column {column!r}; the columns are {', '.join(schema.names)}; choose one with --text-field"
        )
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{path}: column {column!r} holds {kind}, it must hold strings")


def _text_of_value(value: pa.Scalar, place: str, column: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: byte {error.start} of {column!r} is not valid UTF-8") from error
    if text is None:
        raise DataError(f"{place}: column {column!r} is null, it must be a string")
    return str(text)

"""Convert the rows of a source to documents. A callback decides whether rows that cannot be read are skipped."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from data_tools.errors import DataError

Row = TypeVar("Row")
Document = TypeVar("Document")


class BadRowError(DataError):
    """A row, line or text of a source cannot be read. The rows after it may still be readable.

    The arguments say where the row is and what is wrong. ``str(error)`` can be slow, because it may count all lines
    before the row.
    """

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))


#: Called with each row that cannot be read. If the function returns, the row is skipped.
OnBadRow = Callable[[BadRowError], None]


def stop_at_bad_row(error: BadRowError) -> None:
    """Raise a DataError with the message of ``error``. Unlike ``error``, a DataError can be sent between processes."""
    raise DataError(str(error)) from error


def parse_rows(
    rows: Iterable[Row], parse: Callable[[Row], Document], on_bad_row: OnBadRow = stop_at_bad_row
) -> Iterator[Document]:
    """Yield ``parse(row)`` for each row. If ``parse`` raises a BadRowError, call ``on_bad_row`` with this error."""
    for row in rows:
        try:
            document = parse(row)
        except BadRowError as error:
            on_bad_row(error)
        else:
            yield document

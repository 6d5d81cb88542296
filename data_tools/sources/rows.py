"""Read the rows of a source. Either stop at the first row that cannot be read, or skip all such rows."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from data_tools.errors import DataError

Row = TypeVar("Row")
Document = TypeVar("Document")


class BadRowError(DataError):
    """A row, line or text of a source cannot be read, but the rows after it can be read.

    The arguments are the place and the problem. The place is converted to text only when the message is needed. This
    conversion can be slow, because the number of a line is found by counting the lines before it.
    """

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))


#: Called with each row that cannot be read. If the function returns, the row is skipped.
OnBadRow = Callable[[BadRowError], None]


def stop_at_bad_row(error: BadRowError) -> None:
    """Raise DataError with the message of ``error``. Unlike ``error``, the DataError can be sent to another process."""
    raise DataError(str(error)) from error


def parse_rows(
    rows: Iterable[Row], parse: Callable[[Row], Document], on_bad_row: OnBadRow = stop_at_bad_row
) -> Iterator[Document]:
    """Yield ``parse(row)`` for each row. ``on_bad_row`` receives each BadRowError that ``parse`` raises."""
    for row in rows:
        try:
            document = parse(row)
        except BadRowError as error:
            on_bad_row(error)
        else:
            yield document

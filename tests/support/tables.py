"""Return Markdown tables, or print them row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table without a final newline."""
    return "\n".join(map(_line, [header, ["---"] * len(header), *rows]))


def print_header(*columns: str) -> None:
    print_row(*columns)
    print_row(*["---"] * len(columns))


def print_row(*cells: object) -> None:
    """Print one row at once, so that a long measurement shows its results as they come."""
    print(_line(cells), flush=True)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"

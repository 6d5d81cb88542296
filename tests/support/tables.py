"""Print Markdown tables row by row. Used by benchmarks."""

from __future__ import annotations


def print_header(*columns: str) -> None:
    """Print the two lines that begin a table."""
    print_row(*columns)
    print_row(*["---"] * len(columns))


def print_row(*cells: object) -> None:
    """Print one row at once, so that a long measurement shows its results as they come."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)

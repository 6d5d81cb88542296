"""What a source is cut into."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """A part of a source that can be read by itself.

    Attributes:
        path: the file, or the first of several.
        start, stop: a half-open range of what the source counts: bytes, row groups, rows, files.
        text_bytes: about how much text that is; None: not known.
    """

    path: str
    start: int
    stop: int
    text_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.path}[{self.start}:{self.stop}]"

"""Decoding tokens to text as they are generated: whole characters only, and never a stop text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one row of tokens.

    Args:
        token_bytes: bytes of each token by id.
        stops: the text ends before the first of them; none may be empty.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        assert all(stops), "a stop text is empty"
        self.stopped = False
        self._token_bytes = token_bytes
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may be the beginning of a stop text

    def feed(self, token: int) -> str:
        """Return the text that is final after this token; empty within a character or a possible stop text."""
        return self._release(self._decoder.decode(self._token_bytes[token]))

    def finish(self) -> str:
        """Return the rest of the text; an incomplete character becomes U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), is_last=True)

    def _release(self, new: str, *, is_last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that is a beginning of ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)

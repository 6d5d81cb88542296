"""Tokens turned into text as they come: characters appear when they are whole, a stop text never."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Text of one row of tokens.

    Args:
        token_bytes: bytes of each token by id.
        stops: the text ends before the first of them; none is empty.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        assert all(stops), "an empty text is everywhere"
        self.stopped = False
        self._token_bytes = token_bytes
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may be the beginning of a stop text

    def feed(self, token: int) -> str:
        """What a token lets be shown: nothing, if it ends within a character or perhaps within a stop text."""
        return self._show(self._decoder.decode(self._token_bytes[token]))

    def finish(self) -> str:
        """What was held back; bytes of a character that never came are U+FFFD."""
        return self._show(self._decoder.decode(b"", final=True), is_last=True)

    def _show(self, new: str, *, is_last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that begins a stop text."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)

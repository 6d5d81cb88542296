"""WikiText as lm-evaluation-harness reads it: articles, with the spaces taken back that its tokens were split by."""

from __future__ import annotations

import re

# In this order. Its author's rule for numbers after an apostrophe is left out: it never applies.
_REPLACEMENTS: tuple[tuple[str, str], ...] = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_BRACKETED = tuple(
    (
        re.compile(rf"{re.escape(opening)}\s*([^{re.escape(closing)}]*?)\s*{re.escape(closing)}"),
        rf"{opening}\1{closing}",
    )
    for opening, closing in ("()", "[]", "{}", '""', "''")
)
_LAST_REPLACEMENTS: tuple[tuple[str, str], ...] = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(page: str) -> str:
    """The text of an article as it would be written: ``1 @.@ 5 m ( 5 ft )`` becomes ``1.5 m (5 ft)``."""
    for old, new in _REPLACEMENTS:
        page = page.replace(old, new)
    for pattern, replacement in _BRACKETED:
        page = pattern.sub(replacement, page)
    for old, new in _LAST_REPLACEMENTS:
        page = page.replace(old, new)
    return page


def split_pages(text: str) -> list[str]:
    """The articles of a WikiText file. Each begins with its title, `` = Title = ``, and holds its sections."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _is_title(line):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def _is_title(line: str) -> bool:
    line = line.strip()
    return line.startswith("= ") and line.endswith(" =") and not line.startswith("= =")

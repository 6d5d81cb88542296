"""The embedded corpus: text that every Python carries, so that no download is needed."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from data_tools.sources.files import describe_files, one_line_read_errors, raise_error

# Installed packages, tests (repetitive, and absent from some distributions), caches. The topics of pydoc_data
# are documents of their own, so the module that holds them as string literals is left out.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "__pycache__"}
)


class StandardLibrarySource:
    """The running Python's library sources, then the topics of its language reference.

    A document is a ``.py`` file, in the order of sorted paths, or a topic. Files that are not UTF-8 are skipped,
    and so is a document that came before, lest one half of a pair end up in training, the other in validation.
    """

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))

    def options(self) -> dict[str, Any]:
        with one_line_read_errors(self._root):
            files = [(path, (self._root / path).stat().st_size) for path in self._relative_paths()]
        return {"python": platform.python_version(), **describe_files(files)}

    def documents(self) -> Iterator[str]:
        seen: set[str] = set()
        for document in chain(self._sources(), _reference_topics()):
            if document not in seen:
                seen.add(document)
                yield document

    def _sources(self) -> Iterator[str]:
        for path in self._relative_paths():
            with one_line_read_errors(self._root / path):
                content = (self._root / path).read_bytes()
            try:
                yield content.decode("utf-8")
            except UnicodeDecodeError:
                continue

    def _relative_paths(self) -> list[Path]:
        paths: list[Path] = []
        for parent, folders, names in os.walk(self._root, onerror=raise_error):
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
            paths.extend(Path(parent, name) for name in names if name.endswith(".py"))
        return sorted(path.relative_to(self._root) for path in paths)


def _reference_topics() -> Iterator[str]:
    # Imported here: it is half a megabyte of text.
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]

"""Read documents from the Python installation: the standard library's source code and Python's help topics."""

import platform
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools.sources.files import (
    FileSizes,
    Slice,
    describe_files,
    group_files,
    one_line_source_errors,
    walk_files,
)
from data_tools.sources.rows import OnBadRow, stop_at_bad_row

# Skip installed packages, caches, and tests, which some distributions lack. pydoc_data is read separately.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "__pycache__"}
)
_TOPICS = "pydoc_data.topics"


class StandardLibrarySource:
    """The ``.py`` files of Python's standard library, and then the topics of the language reference.

    Each file and each topic is one document. Files that are not UTF-8 are skipped.
    """

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        with one_line_source_errors(self._root):
            paths = sorted(walk_files(self._root, (".py",), _SKIPPED_FOLDERS))
            self.files: FileSizes = [(path.relative_to(self._root).as_posix(), path.stat().st_size) for path in paths]

    def options(self) -> dict[str, Any]:
        return {"python": platform.python_version(), **describe_files(self.files)}

    def text_bytes(self) -> int:
        return sum(size for _, size in self.files)

    def whole_texts(self, count: int, above_bytes: int) -> list[int]:
        return []

    def notices(self) -> list[str]:
        return []

    def slices(self, slice_bytes: int) -> list[Slice]:
        return [*group_files(self.files, slice_bytes), Slice(_TOPICS, 0, 1, 0)]

    def read(self, source_slice: Slice, on_bad_row: OnBadRow = stop_at_bad_row) -> Iterator[str]:
        if source_slice.path == _TOPICS:
            # Imported here because the module contains half a megabyte of text.
            from pydoc_data.topics import topics

            yield from (topics[name] for name in sorted(topics))
            return
        for path, _ in self.files[source_slice.start : source_slice.stop]:
            with one_line_source_errors(path), suppress(UnicodeDecodeError):
                yield (self._root / path).read_bytes().decode("utf-8")

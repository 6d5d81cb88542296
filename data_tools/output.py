"""The folder that a run fills: begun, continued after a crash, completed, and never mistaken for another's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.arrays import TokenArray
from data_tools.errors import DataError
from data_tools.journal import JOURNAL_NAME, Journal
from data_tools.shards import (
    MANIFEST_NAME,
    SHARD_FORMATS,
    TRAIN_SPLIT,
    VAL_SPLIT,
    Manifest,
    ShardRecord,
    ShardWriter,
    SourceRecord,
    TokenizerRecord,
    load_manifest,
    map_shard,
)
from data_tools.storage import TEMPORARY_SUFFIX, one_line_write_errors, write_json_durably

_OUR_FILES = re.compile(
    rf"({TRAIN_SPLIT}|{VAL_SPLIT})_\d{{6,}}\.({'|'.join(SHARD_FORMATS)})({re.escape(TEMPORARY_SUFFIX)})?"
    rf"|{re.escape(MANIFEST_NAME + TEMPORARY_SUFFIX)}"
)


def load_complete(folder: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of a folder that the request of this identity has already completed, else None.

    Raises:
        DataError: the folder is complete but another request's, or a shard of it is missing or damaged.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = load_manifest(folder)
    made_by = {key: value for key, value in manifest.to_json().items() if key in identity}
    _check_same_request(folder, made_by, identity)
    for shard in manifest.shards:
        map_shard(folder, shard)
    # It is still there when the run that wrote the manifest was killed right after.
    with one_line_write_errors(folder):
        (folder / JOURNAL_NAME).unlink(missing_ok=True)
    return manifest


class OutputFolder:
    """The output folder of one run; make one with ``open_output``.

    Attributes:
        finished: the shards that are done, by split.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, format: str, shard_tokens: int) -> None:
        self._folder = folder
        self._identity = identity
        self._created = _prepare_folder(folder)
        try:
            self._journal = Journal(folder, identity)
        except DataError:
            self._remove_if_created()
            raise
        try:
            _check_same_request(folder, self._journal.identity, identity)
            self._splits = {
                split: _SplitWriter(folder, split, format, shard_tokens, self._journal)
                for split in (TRAIN_SPLIT, VAL_SPLIT)
            }
            self._remove_leftovers()
        except BaseException:
            self._journal.close()
            raise
        self.finished = {split: tuple(writer.finished) for split, writer in self._splits.items()}

    def append(self, split: str, tokens: TokenArray, utf8_bytes: int) -> None:
        """Add one document to its split.

        Args:
            split: ``train`` or ``val``.
            tokens: uint16 of shape (tokens,), ``END_OF_TEXT`` first.
            utf8_bytes: bytes of its text.

        Raises:
            DataError: the disk is full or otherwise refuses.
        """
        self._splits[split].append(tokens, utf8_bytes)

    def complete(self) -> Manifest:
        """Close the last shards and write the manifest.

        Raises:
            DataError: the disk is full or otherwise refuses.
        """
        for writer in self._splits.values():
            writer.close()
        manifest = Manifest(
            tokenizer=TokenizerRecord(**self._identity["tokenizer"]),
            source=SourceRecord(**self._identity["source"]),
            settings=self._identity["settings"],
            shards=tuple(shard for writer in self._splits.values() for shard in writer.finished),
        )
        path = self._folder / MANIFEST_NAME
        with one_line_write_errors(path):
            write_json_durably(path, manifest.to_json())
        self._journal.remove()
        return manifest

    def abandon(self) -> None:
        """Leave the finished shards and the journal with which the same request continues.

        If no shard was finished, nothing is left at all.
        """
        for writer in self._splits.values():
            writer.abort()
        self._remove_leftovers()
        if not self._journal.shards:
            self._journal.remove()
            self._remove_if_created()

    def close(self) -> None:
        """Release the folder."""
        self._journal.close()

    def _remove_if_created(self) -> None:
        if self._created and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _remove_leftovers(self) -> None:
        """Remove shards that are not whole, or were not recorded before a crash."""
        finished = {shard.file for writer in self._splits.values() for shard in writer.finished}
        with one_line_write_errors(self._folder):
            for path in self._folder.iterdir():
                if _OUR_FILES.fullmatch(path.name) and path.name not in finished:
                    path.unlink()


@contextmanager
def open_output(folder: Path, identity: dict[str, Any], *, format: str, shard_tokens: int) -> Iterator[OutputFolder]:
    """Begin an output folder, or take it up where the same request left it; an error in the block abandons it.

    Raises:
        DataError: the folder is another's, in use, or cannot be written.
    """
    output = OutputFolder(folder, identity, format=format, shard_tokens=shard_tokens)
    try:
        yield output
    except BaseException:
        output.abandon()
        raise
    finally:
        output.close()


class _SplitWriter:
    """The shards of one split, one after the other."""

    def __init__(self, folder: Path, split: str, format: str, shard_tokens: int, journal: Journal) -> None:
        self._folder = folder
        self._split = split
        self._format = format
        self._shard_tokens = shard_tokens
        self._journal = journal
        self._shard: ShardWriter | None = None
        self.finished = list(self._intact_shards(journal.shards))

    def append(self, tokens: TokenArray, utf8_bytes: int) -> None:
        if self._shard is not None and self._shard.tokens + tokens.size > self._shard_tokens:
            self.close()
        if self._shard is None:
            self._shard = ShardWriter(self._folder, self._file_name(len(self.finished)), self._split)
        self._shard.append(tokens, documents=1, utf8_bytes=utf8_bytes)

    def close(self) -> None:
        if self._shard is not None:
            record = self._shard.close()
            self._shard = None
            self._journal.append(record)
            self.finished.append(record)

    def abort(self) -> None:
        if self._shard is not None:
            self._shard.abort()

    def _file_name(self, index: int) -> str:
        return f"{self._split}_{index:06d}.{self._format}"

    def _intact_shards(self, recorded: list[ShardRecord]) -> Iterator[ShardRecord]:
        """The finished shards up to the first that has gone since; it and what follows are made anew."""
        by_file = {shard.file: shard for shard in recorded}
        index = 0
        while shard := by_file.get(self._file_name(index)):
            try:
                map_shard(self._folder, shard)
            except DataError:
                return
            yield shard
            index += 1


def _prepare_folder(folder: Path) -> bool:
    """Make sure that the folder is there and empty or ours; say whether it was created."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder} is a file; name a folder")
    with one_line_write_errors(folder):
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
    if names and JOURNAL_NAME not in names:
        raise DataError(
            f"--out {folder} is not empty (it holds {names[0]}) and was not made by this command; "
            "name a new or empty folder"
        )
    return created


def _check_same_request(folder: Path, made_by: dict[str, Any], identity: dict[str, Any]) -> None:
    before, now = dict(_flatten(made_by)), dict(_flatten(identity))
    for key in before | now:
        if before.get(key) != now.get(key):
            raise DataError(
                f"{folder} was made by another request: {key} was {before.get(key)!r}, "
                f"now it is {now.get(key)!r}; name another --out, or delete {folder} to start again"
            )


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item

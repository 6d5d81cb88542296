"""The folder that a run fills: planned, continued after a crash, completed, and never mistaken for another's.

While it is being filled it holds ``plan.json`` (who makes it, and its chunks) and, for each finished chunk, its shards
and ``tasks/<chunk>.json``. At the end the manifest takes the place of both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from data_tools.corpus.chunks import Chunk
from data_tools.corpus.records import ChunkRecord, report_of
from data_tools.errors import DataError, one_line_write_errors
from data_tools.shards import (
    MANIFEST_NAME,
    SHARD_FORMATS,
    TRAIN_SPLIT,
    VAL_SPLIT,
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    load_manifest,
    map_mask,
    map_shard,
    parse_manifest,
)
from data_tools.storage.atomic import fsync_folder
from data_tools.storage.folders import Folder, LocalFolder, is_scratch, open_folder
from data_tools.storage.locks import LOCK_NAME, FileLock, lock_folder

PLAN_NAME = "plan.json"
_CHUNKS = "tasks/"
_SHARD_FILES = re.compile(rf"({TRAIN_SPLIT}|{VAL_SPLIT})_\d{{5,}}_\d{{3,}}(\.mask)?\.({'|'.join(SHARD_FORMATS)})")


def record_name(chunk: Chunk) -> str:
    """The file of a finished chunk's record."""
    return f"{_CHUNKS}{chunk.name}.json"


def fingerprints_name(chunk: Chunk) -> str:
    """The file of what tells the documents of a chunk apart."""
    return f"{_CHUNKS}{chunk.name}.fingerprints.npy"


def repeated_name(chunk: Chunk) -> str:
    """The file of the numbers of the chunk's documents that came before."""
    return f"{_CHUNKS}{chunk.name}.repeated.npy"


def publish_chunk(folder: Folder, chunk: Chunk, record: ChunkRecord, scratch: Path) -> None:
    """Move the shards of a chunk from its scratch folder into place, then its record: now it is finished."""
    for shard in record.shards:
        for name in (shard.mask_file, shard.file):
            if name is not None:
                folder.take(scratch / name, name)
    folder.write(record_name(chunk), json.dumps(record.to_json()).encode("ascii"))


def load_complete(out: Path | str, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of a folder that the request of this identity has already completed, else None.

    Raises:
        DataError: the folder is complete but another request's, or a shard of it is missing or damaged.
    """
    folder = open_folder(out)
    if folder.size(MANIFEST_NAME) is None:
        return None
    if isinstance(folder, LocalFolder):
        manifest = load_manifest(folder.path)
    else:
        manifest = parse_manifest(folder.read(MANIFEST_NAME), f"{out}/{MANIFEST_NAME}")
    made_by = {key: value for key, value in manifest.to_json().items() if key in identity}
    _expect_same_request(out, made_by, identity)
    for shard in manifest.shards:
        _expect_whole(folder, shard, str(out))
    # They are still there when the run that wrote the manifest was killed right after.
    _remove_what_led_there(folder)
    folder.remove({LOCK_NAME} & folder.names())
    return manifest


class OutputFolder:
    """The output folder of one run; make one with ``open_output``.

    Attributes:
        finished: the records of finished chunks by index.
    """

    def __init__(self, out: Path | str, identity: dict[str, Any], lock: FileLock | None) -> None:
        self.folder = open_folder(out)
        self._out = str(out)
        self._identity = identity
        self._lock = lock
        self._chunks: list[Chunk] | None = None
        self.finished: dict[int, ChunkRecord] = {}

    def plan(self, make_plan: Callable[[], list[Chunk]]) -> list[Chunk]:
        """The chunks of this run: those of the run that is continued, or new ones.

        Raises:
            DataError: the folder is another request's, the plan is damaged, or the disk refuses.
        """
        if self.folder.size(PLAN_NAME) is None:
            chunks = make_plan()
            plan = {"identity": self._identity, "tasks": [chunk.to_json() for chunk in chunks]}
            self._chunks = chunks
            self.folder.write(PLAN_NAME, json.dumps(plan).encode("ascii"))
            return chunks
        try:
            plan = json.loads(self.folder.read(PLAN_NAME))
            chunks = [Chunk.from_json(chunk) for chunk in plan["tasks"]]
            made_by = dict(plan["identity"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self._out}/{PLAN_NAME} is damaged; delete {self._out} and start again") from error
        _expect_same_request(self._out, made_by, self._identity)
        self._chunks = chunks
        return chunks

    def look_for_finished(self, chunks: Iterable[Chunk]) -> None:
        """Find the records whose shards are there; the others' chunks are to be done again."""
        names = self.folder.names()
        for chunk in chunks:
            if record_name(chunk) in names:
                with suppress(FileNotFoundError):  # another one has just completed a remote folder
                    content = self.folder.read(record_name(chunk))
                    record = ChunkRecord.from_json(content, f"{self._out}/{record_name(chunk)}")
                    if all(self._is_whole(shard) for shard in record.shards):
                        self.finished[chunk.index] = record

    def remove_leftovers(self) -> None:
        """Remove what unfinished chunks of killed processes left; nobody else may be writing."""
        ours = {name for record in self.finished.values() for shard in record.shards for name in _files_of(shard)}
        names = {name for name in self.folder.names() if name not in ours}
        self.folder.remove({name for name in names if _SHARD_FILES.fullmatch(name)})
        self.folder.remove_scratch()

    def complete_if_last(self, chunks: list[Chunk], made: Callable[[], dict[str, Any]]) -> Manifest | None:
        """Complete a folder that processes share, if all chunks are finished and no other process is at work.

        Raises:
            DataError: as ``complete``.
        """
        if self._lock is not None and not self._lock.make_exclusive():
            return None
        self.look_for_finished(chunks)
        if len(self.finished) < len(chunks):
            return load_complete(self._out, self._identity)  # of a remote folder another one may have been the last
        return self.complete(chunks, made())

    def complete(self, chunks: list[Chunk], made: dict[str, Any]) -> Manifest:
        """Write the manifest of the finished chunks, all of them; nothing but it and the shards stays.

        Raises:
            DataError: there is no document at all, or the disk refuses.
        """
        records = [self.finished[chunk.index] for chunk in chunks]
        shards = tuple(shard for record in records for shard in record.shards)
        if not shards:
            _remove_what_led_there(self.folder)
            raise DataError(f"--source {self._identity['source']['kind']} has no document with text in it")
        manifest = Manifest(
            tokenizer=TokenizerRecord(**self._identity["tokenizer"]),
            source=SourceRecord(**self._identity["source"]),
            settings=self._identity["settings"],
            shards=tuple(sorted(shards, key=lambda shard: shard.split)),
            report=report_of(records),
            made=made,
        )
        self.folder.write(MANIFEST_NAME, manifest.to_bytes())
        _remove_what_led_there(self.folder)
        return manifest

    def abandon(self, *, shared: bool) -> None:
        """Leave the finished chunks and the plan, with which the same request continues; without any, nothing.

        What processes share is left to the last of them.
        """
        if self._chunks is None:  # it is another request's, or not begun
            return
        if shared and (self._lock is None or not self._lock.make_exclusive()):
            return
        self.look_for_finished(self._chunks)
        self.remove_leftovers()
        if not any(name.startswith(_CHUNKS) for name in self.folder.names()):
            self.folder.remove({PLAN_NAME})

    def _is_whole(self, shard: ShardRecord) -> bool:
        try:
            _expect_whole(self.folder, shard, self._out)
        except DataError:
            return False
        return True


@contextmanager
def open_output(out: Path | str, identity: dict[str, Any], *, shared: bool) -> Iterator[OutputFolder]:
    """Begin an output folder, or take it up where the same request left it; an error in the block abandons it.

    Args:
        shared: other processes, each with chunks of its own, write to it at the same time.

    Raises:
        DataError: the folder is another's, in use, or cannot be written.
    """
    folder = open_folder(out)
    with ExitStack() as stack:
        lock = None
        if isinstance(folder, LocalFolder):
            stack.enter_context(_created(folder.path))
        _expect_ours(folder, out)
        if isinstance(folder, LocalFolder):
            lock = stack.enter_context(lock_folder(folder.path, shared=shared))
        output = OutputFolder(out, identity, lock)
        try:
            yield output
        except BaseException:
            output.abandon(shared=shared)
            raise


@contextmanager
def _created(path: Path) -> Iterator[None]:
    """See to it that a folder is there; if the block fails, what was created goes as far as it is empty."""
    if path.exists() and not path.is_dir():
        raise DataError(f"--out {path} is a file; name a folder")
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    with one_line_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        for folder in created:
            fsync_folder(folder.parent)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty
            for folder in created:
                folder.rmdir()
        raise


def _expect_ours(folder: Folder, out: Path | str) -> None:
    # Of a local folder the names at its top: what is not ours may be large.
    names = {path.name for path in folder.path.iterdir()} if isinstance(folder, LocalFolder) else folder.names()
    others = sorted(name for name in names - {LOCK_NAME} if not is_scratch(name))
    if others and not names & {PLAN_NAME, MANIFEST_NAME}:
        raise DataError(
            f"--out {out} is not empty (it holds {others[0]}) and was not made by this command; "
            "name a new or empty folder"
        )


def _files_of(shard: ShardRecord) -> list[str]:
    return [name for name in (shard.file, shard.mask_file) if name is not None]


def _expect_whole(folder: Folder, shard: ShardRecord, place: str) -> None:
    """Of a local shard its size and format, of a remote one that it is there."""
    if isinstance(folder, LocalFolder):
        map_shard(folder.path, shard)
        if shard.mask_file is not None:
            map_mask(folder.path, shard)
        return
    for name in _files_of(shard):
        if folder.size(name) is None:
            raise DataError(f"{place}/{name} is missing, though {MANIFEST_NAME} names it; tokenize again")


def _remove_what_led_there(folder: Folder) -> None:
    names = folder.names()
    folder.remove_scratch()
    folder.remove({name for name in names if name.startswith(_CHUNKS)})
    folder.remove({PLAN_NAME} & names)  # the last: it says whose the others are


def _expect_same_request(out: Path | str, made_by: dict[str, Any], identity: dict[str, Any]) -> None:
    before, now = dict(_flatten(made_by)), dict(_flatten(identity))
    for key in before | now:
        if before.get(key) != now.get(key):
            raise DataError(
                f"{out} was made by another request: {key} was {before.get(key)!r}, "
                f"now it is {now.get(key)!r}; name another --out, or delete {out} to start again"
            )


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item

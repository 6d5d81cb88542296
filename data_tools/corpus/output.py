"""Create and complete the output folder of a tokenize request.

1. At the start, ``plan.json`` is written: the chunks and the identity of the request (``identity_of``).
2. After each chunk, its shards and its record ``tasks/<chunk>.json`` are written.
3. At the end, the manifest is written. Then the plan and the records are removed.

An interrupted request can continue. If the plan contains another identity, the request is refused.
"""

import json
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.corpus.chunks import RECORDS_FOLDER, REPORTED_BAD_ROWS, Chunk, ChunkRecord
from data_tools.encoding.encoders import REFERENCE_ENCODER, encoder_version
from data_tools.errors import DataError, one_line_write_errors
from data_tools.shards.contents import Contents
from data_tools.shards.manifest import (
    MANIFEST_NAME,
    TRAIN_SPLIT,
    VAL_SPLIT,
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    load_manifest,
    parse_manifest,
)
from data_tools.shards.mapping import map_mask, map_shard
from data_tools.shards.writer import SHARD_FORMATS
from data_tools.storage.folders import Folder, LocalFolder, is_scratch, open_folder
from data_tools.storage.json_values import dotted_keys
from data_tools.storage.locks import LOCK_NAME, FileLock, lock_folder
from data_tools.storage.new_folders import create_folder, removed_if_unused

PLAN_NAME = "plan.json"
_SHARD_FILES = re.compile(rf"({TRAIN_SPLIT}|{VAL_SPLIT})_\d{{5,}}_\d{{3,}}(\.mask)?\.({'|'.join(SHARD_FORMATS)})")


def load_complete(out: Path | str, identity: dict[str, Any]) -> Manifest | None:
    """Return the manifest of an output folder, or None if the folder is not complete.

    Raises:
        DataError: another request wrote the folder (its manifest differs from ``identity``), or a shard is damaged.
    """
    folder = open_folder(out)
    if folder.size(MANIFEST_NAME) is None:
        return None
    if isinstance(folder, LocalFolder):
        manifest = load_manifest(folder.path)
    else:
        manifest = parse_manifest(folder.read(MANIFEST_NAME), f"{out}/{MANIFEST_NAME}")
    made_by = {key: value for key, value in manifest.to_json().items() if key in identity}
    _check_same_request(out, made_by, identity)
    for shard in manifest.shards:
        _check_shard(folder, shard, str(out))
    # If the process was killed after it wrote the manifest, the plan and the records still exist.
    _remove_work_files(folder)
    folder.remove({LOCK_NAME} & folder.names())
    return manifest


class OutputFolder:
    """The output folder of an unfinished request. Use ``open_output`` to get an instance.

    Attributes:
        chunks: all chunks of the request. Empty before ``plan`` is called.
        finished: the records of the finished chunks, by chunk index.
    """

    def __init__(self, out: Path | str, identity: dict[str, Any], *, shared: bool, lock: FileLock | None) -> None:
        self.folder = open_folder(out)
        self.chunks: list[Chunk] = []
        self.finished: dict[int, ChunkRecord] = {}
        self._out = str(out)
        self._identity = identity
        self._shared = shared
        self._lock = lock
        self._is_planned = False

    @property
    def progress(self) -> Contents:
        """Return how many documents, tokens and bytes of text all finished chunks contain."""
        return sum((record.progress for record in self.finished.values()), Contents())

    def plan(self, make_plan: Callable[[], list[Chunk]]) -> None:
        """Set ``chunks`` and ``finished``. Call this before any chunk is encoded.

        If the folder contains a plan, load it. Otherwise, write a plan with the chunks that ``make_plan`` returns.

        Raises:
            DataError: the folder belongs to another request.
        """
        if self.folder.size(PLAN_NAME) is None:
            self.chunks = make_plan()
            self._is_planned = True
            # The key is "tasks", as in folders of earlier versions.
            plan = {"identity": self._identity, "tasks": [asdict(chunk) for chunk in self.chunks]}
            self.folder.write(PLAN_NAME, json.dumps(plan).encode("ascii"))
        else:
            try:
                plan = json.loads(self.folder.read(PLAN_NAME))
                self.chunks = [Chunk.from_json(chunk) for chunk in plan["tasks"]]
                made_by = dict(plan["identity"])
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{self._out}/{PLAN_NAME} is damaged; delete {self._out} and start again") from error
            _check_same_request(self._out, made_by, self._identity)
            self._is_planned = True
        self._find_finished()

    def remove_leftovers(self) -> None:
        """Remove the files of unfinished chunks. Call this method only while no other process writes to the folder."""
        finished = {name for record in self.finished.values() for shard in record.shards for name in shard.files}
        self.folder.remove({name for name in self.folder.names() - finished if _SHARD_FILES.fullmatch(name)})
        self.folder.remove_scratch()

    def complete(self, *, encoder: str, engine: str) -> Manifest | None:
        """Write the manifest and return it. Remove the plan and the records of the chunks.

        Each process that shares the folder must call this method. Only the last call writes the manifest. The earlier
        calls return None.

        Raises:
            DataError: the source has no document with text, or another process has removed shards from the folder.
        """
        if self._shared and self._lock is not None and not self._lock.make_exclusive():
            return None
        if self._shared or self._lock is None:
            self._find_finished()
            if len(self.finished) < len(self.chunks):
                completed = load_complete(self._out, self._identity)  # by another process, in a remote folder
                if completed or self._shared:
                    return completed
                raise DataError(
                    f"{self._out}: shards are missing, because another command has written to the same URL; run this "
                    "command again, and only one at a time"
                )
        records = [self.finished[chunk.index] for chunk in self.chunks]
        shards = [shard for record in records for shard in record.shards]
        if not shards:
            _remove_work_files(self.folder)
            raise DataError(f"--source {self._identity['source']['kind']} has no document with text in it")
        manifest = Manifest(
            tokenizer=TokenizerRecord(**self._identity["tokenizer"]),
            source=SourceRecord(**self._identity["source"]),
            settings=self._identity["settings"],
            shards=tuple(sorted(shards, key=lambda shard: shard.split)),
            report=_report(records, "on_bad_rows" in self._identity["source"]["options"]),
            made=self._describe_work(records, encoder, engine),
        )
        self.folder.sync()  # the manifest must not be durable before its shards are
        self.folder.write(MANIFEST_NAME, manifest.to_bytes())
        _remove_work_files(self.folder)
        return manifest

    def abandon(self) -> None:
        """Remove the files of unfinished chunks. The same request can continue later.

        If no chunk is finished, also remove the plan. Remove nothing if other processes use the folder, or if the
        method ``plan`` has failed.
        """
        if not self._is_planned:  # the folder may belong to another request
            return
        if self._shared and (self._lock is None or not self._lock.make_exclusive()):
            return
        self._find_finished()
        self.remove_leftovers()
        if not any(name.startswith(RECORDS_FOLDER) for name in self.folder.names()):
            self.folder.remove({PLAN_NAME})

    def _describe_work(self, records: list[ChunkRecord], encoder: str, engine: str) -> dict[str, Any]:
        made: dict[str, Any] = {
            "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "encoder": encoder_version(encoder),
            "reference": encoder_version(REFERENCE_ENCODER),
            "checked_documents": sum(record.checked for record in records),
            "python": platform.python_version(),
            "engine": engine,
        }
        if "dataset" in self._identity["source"]["options"]:
            made["dataset"] = self.chunks[0].slices[0].path  # with its commit, if it is on the hub
        return made

    def _find_finished(self) -> None:
        """Load the records of chunks that have all their shards. All other chunks will be encoded again."""
        names = self.folder.names()
        self.finished = {}
        for chunk in self.chunks:
            if chunk.record_file not in names:
                continue
            with suppress(FileNotFoundError):  # another process has just completed a remote folder
                content = self.folder.read(chunk.record_file)
                record = ChunkRecord.from_bytes(content, f"{self._out}/{chunk.record_file}")
                with suppress(DataError):
                    for shard in record.shards:
                        _check_shard(self.folder, shard, self._out)
                    self.finished[chunk.index] = record


@contextmanager
def open_output(out: Path | str, identity: dict[str, Any], *, shared: bool) -> Iterator[OutputFolder]:
    """Return a context manager that creates an output folder, or opens the folder of an interrupted request.

    The ``with`` block gets an ``OutputFolder``. If the block raises an error, ``OutputFolder.abandon`` is called.
    ``shared`` must be True if other processes write to the folder at the same time. A folder at a URL is not locked.

    Raises:
        DataError: the local folder is in use, or the folder contains files that stage 1 did not write.
    """
    folder = open_folder(out)
    path = folder.path if isinstance(folder, LocalFolder) else None
    with _created(path) if path else nullcontext():
        _check_origin(folder, out)
        with lock_folder(path, shared=shared) if path else nullcontext() as lock:
            output = OutputFolder(out, identity, shared=shared, lock=lock)
            try:
                yield output
            except BaseException:
                output.abandon()
                raise


@contextmanager
def _created(path: Path) -> Iterator[None]:
    if path.exists() and not path.is_dir():
        raise DataError(f"--out {path} is a file; name a folder")
    with one_line_write_errors(path):
        created = create_folder(path)
    with removed_if_unused(created):
        yield


def _check_origin(folder: Folder, out: Path | str) -> None:
    # List only the top level of a local folder, because a folder of unrelated files may be large.
    names = {path.name for path in folder.path.iterdir()} if isinstance(folder, LocalFolder) else folder.names()
    others = sorted(name for name in names - {LOCK_NAME} if not is_scratch(name))
    if others and not names & {PLAN_NAME, MANIFEST_NAME}:
        raise DataError(
            f"--out {out} is not empty (it holds {others[0]}) and was not made by this command; "
            "name a new or empty folder"
        )


def _check_shard(folder: Folder, shard: ShardRecord, place: str) -> None:
    if isinstance(folder, LocalFolder):
        map_shard(folder.path, shard)
        if shard.mask_file is not None:
            map_mask(folder.path, shard)
        return
    for name in shard.files:
        if folder.size(name) is None:
            raise DataError(f"{place}/{name} is missing, though {MANIFEST_NAME} names it; tokenize again")


def _check_same_request(out: Path | str, made_by: dict[str, Any], identity: dict[str, Any]) -> None:
    before, now = dict(dotted_keys(made_by)), dict(dotted_keys(identity))
    for key in before | now:
        if before.get(key) != now.get(key):
            raise DataError(
                f"{out} was made by another request: {key} was {json.dumps(before.get(key))}, "
                f"now it is {json.dumps(now.get(key))}; name another --out (data.path in a config), or "
                f"delete {out} to start again"
            )


def _remove_work_files(folder: Folder) -> None:
    names = folder.names()
    folder.remove_scratch()
    folder.remove({name for name in names if name.startswith(RECORDS_FOLDER)})
    folder.remove({PLAN_NAME} & names)  # last, because the plan names the request that wrote the other files


def _report(records: list[ChunkRecord], skips_bad_rows: bool) -> dict[str, Any]:
    """Return the report for the manifest. Equal requests give equal reports."""
    lengths = np.sum([record.lengths for record in records], axis=0).tolist()
    while lengths and lengths[-1] == 0:
        lengths.pop()
    report = {
        "documents_by_log2_tokens": lengths,
        "repeated_documents": sum(record.repeated for record in records),
    }
    if any(record.is_divided for record in records):
        report["divided_documents"] = 1
    if empty := sum(record.empty for record in records):
        report["empty_documents"] = empty
    if skips_bad_rows:
        report["bad_rows"] = sum(record.bad_rows for record in records)
        report["first_bad_rows"] = [place for record in records for place in record.bad_places][:REPORTED_BAD_ROWS]
    return report

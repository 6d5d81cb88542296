"""The journal of an unfinished folder of shards: who makes it, and which shards are done.

Its first line is the identity of the request, every other line the record of a shard that is whole and on the
disk. It is appended to and fsynced, so that after a crash at most its last line is torn. Holding it open
locks the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.errors import DataError
from data_tools.shards import ShardRecord
from data_tools.storage import fsync_folder, one_line_write_errors

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """The open journal of a folder; close it, or ``remove`` it when the folder is complete.

    Attributes:
        identity: of the request that makes the folder.
        shards: records in the order in which the shards were finished.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Open or begin the journal of an existing folder.

        Args:
            folder: the output folder.
            identity: written if there is no journal yet; otherwise the journal keeps its own.

        Raises:
            DataError: another process holds the folder, the journal is damaged, or cannot be written.
        """
        self._path = folder / JOURNAL_NAME
        with one_line_write_errors(self._path):
            self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 (open as long as the journal)
            try:
                self._lock()
                self.identity, self.shards = self._recover(identity)
            except BaseException:
                self._file.close()
                raise

    def append(self, shard: ShardRecord) -> None:
        """Record a finished shard durably.

        Raises:
            DataError: the disk is full or otherwise refuses.
        """
        with one_line_write_errors(self._path):
            self._write_line(asdict(shard))
        self.shards.append(shard)

    def remove(self) -> None:
        """Delete the journal, durably."""
        with one_line_write_errors(self._path):
            self._path.unlink(missing_ok=True)
            fsync_folder(self._path.parent)
        self.close()

    def close(self) -> None:
        """Release the folder."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{self._path.parent} is being written by another process; wait for it or end it"
            ) from error

    def _recover(self, identity: dict[str, Any]) -> tuple[dict[str, Any], list[ShardRecord]]:
        """What the whole lines say; what follows the last whole line is cut off."""
        self._file.seek(0)
        content = self._file.read()
        whole_lines = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole_lines))
        if not whole_lines:
            self._begin(identity)
            return identity, []
        first, *others = [self._parse(line) for line in whole_lines.splitlines()]
        return first, [ShardRecord.from_json(value, str(self._path)) for value in others]

    def _begin(self, identity: dict[str, Any]) -> None:
        try:
            self._write_line(identity)
            fsync_folder(self._path.parent)
        except OSError:
            self._path.unlink()
            raise

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self._path} is damaged; delete {self._path.parent} and start again") from error
        if not isinstance(value, dict):
            raise DataError(f"{self._path} is damaged; delete {self._path.parent} and start again")
        return value

    def _write_line(self, value: dict[str, Any]) -> None:
        line = json.dumps(value).encode("ascii") + b"\n"
        # A raw write may take only a part, just before the disk is full; the next one then says why.
        while line:
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())

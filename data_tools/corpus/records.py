"""What a finished chunk leaves behind, and what the records of all chunks add up to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_tools.arrays import CountArray
from data_tools.errors import DataError
from data_tools.shards import ShardRecord

_LENGTH_CLASSES = 33


@dataclass(frozen=True)
class ChunkRecord:
    """One finished chunk.

    Attributes:
        index: the chunk's.
        shards: what it wrote.
        lengths: documents of 2**k to 2**(k+1) - 1 tokens, for k from 0 on.
        repeated: documents that were left out because an equal one came before.
        checked: documents whose tokens were compared with tiktoken's.
    """

    index: int
    shards: tuple[ShardRecord, ...]
    lengths: tuple[int, ...]
    repeated: int
    checked: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "shards": [shard.to_json() for shard in self.shards]}

    @classmethod
    def from_json(cls, content: bytes, place: str) -> ChunkRecord:
        """What ``to_json`` gave, as a file has it.

        Raises:
            DataError: it is damaged.
        """
        try:
            value = json.loads(content)
            shards = tuple(ShardRecord.from_json(shard, place) for shard in value.pop("shards"))
            return cls(**{**value, "shards": shards, "lengths": tuple(value["lengths"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{place} is damaged; delete it to make its shards again") from error


@dataclass(frozen=True)
class Progress:
    """What has been tokenized so far, chunks that an interrupted run had finished included."""

    documents: int = 0
    tokens: int = 0
    utf8_bytes: int = 0

    def plus(self, documents: int, tokens: int, utf8_bytes: int) -> Progress:
        """The progress with this on top."""
        return Progress(self.documents + documents, self.tokens + tokens, self.utf8_bytes + utf8_bytes)


def progress_of(records: Iterable[ChunkRecord]) -> Progress:
    """The sums over all shards."""
    progress = Progress()
    for record in records:
        for shard in record.shards:
            progress = progress.plus(shard.documents, shard.tokens, shard.utf8_bytes)
    return progress


def report_of(records: Iterable[ChunkRecord]) -> dict[str, Any]:
    """What was found on the way, for the manifest; a function of the request alone."""
    records = list(records)
    lengths = np.sum([record.lengths for record in records], axis=0).tolist()
    while lengths and lengths[-1] == 0:
        lengths.pop()
    return {
        "documents_by_log2_tokens": lengths,
        "repeated_documents": sum(record.repeated for record in records),
    }


class LengthCounts:
    """Counts documents by the power of two of their tokens."""

    def __init__(self) -> None:
        self._counts: CountArray = np.zeros(_LENGTH_CLASSES, dtype=np.int64)

    def add(self, tokens: int) -> None:
        """Count a document."""
        self._counts[tokens.bit_length() - 1] += 1

    def to_tuple(self) -> tuple[int, ...]:
        """The counts by k of 2**k."""
        return tuple(self._counts.tolist())

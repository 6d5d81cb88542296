"""Which tokens go into which file of a new folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import PurePosixPath

import numpy as np

from data_tools.errors import DataError
from data_tools.formats.collection import TokenCollection, Tokens, expect_split_name
from data_tools.formats.flat_files import LLMC, NANOGPT
from data_tools.formats.request import DEFAULT_SHARD_TOKENS, ConvertRequest
from data_tools.shards import SHARD_FORMATS, TRAIN_SPLIT, VAL_SPLIT, ShardRecord
from data_tools.shards.llmc import LLMC_SUFFIX

CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class PlannedFile:
    """A file to write: tokens ``start`` to ``stop`` of its split.

    ``record`` is that of the shard of ours that holds the same tokens, where there is one.
    """

    name: str
    split: str
    start: int
    stop: int
    record: ShardRecord | None = None


def plan_files(request: ConvertRequest, collection: TokenCollection, *, knows_bytes: bool) -> list[PlannedFile]:
    """The files that a conversion writes.

    Args:
        request: of the conversion.
        collection: what it converts.
        knows_bytes: whether bytes of text can be counted in the collection's vocabulary.

    Raises:
        DataError: what the collection holds cannot be kept in the format asked for.
    """
    for split in collection.splits:
        expect_split_name(split, str(collection.path))
    if keeps_shards(request, collection):
        return list(_same_shards(collection, request.to))
    _expect_nothing_lost(request, collection, knows_bytes)
    if request.to == NANOGPT:
        return list(_whole_splits(collection))
    shard_tokens = request.shard_tokens or DEFAULT_SHARD_TOKENS
    if request.to == LLMC:
        return list(_llmc_shards(collection, request.file_name, shard_tokens))
    return list(_document_shards(collection, request.to, shard_tokens))


def keeps_shards(request: ConvertRequest, collection: TokenCollection) -> bool:
    """Whether the shards of a folder of ours are written again one by one."""
    return collection.manifest is not None and request.to in SHARD_FORMATS and request.shard_tokens is None


def chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Start and length of the successive reads that cover a range."""
    return ((at, min(CHUNK_TOKENS, stop - at)) for at in range(start, stop, CHUNK_TOKENS))


def _expect_nothing_lost(request: ConvertRequest, collection: TokenCollection, knows_bytes: bool) -> None:
    instead = f"--to {' or '.join(SHARD_FORMATS)} without --shard-tokens keeps the shards as they are"
    for split in collection.splits:
        for shard in collection.records_of(split):
            if shard.mask_file:
                raise DataError(
                    f"{collection.path / shard.mask_file} says which tokens are scored, which would be lost; {instead}"
                )
    if request.to != NANOGPT and not knows_bytes:
        raise DataError(
            f"{collection.path} is of the tokenizer {collection.tokenizer.name!r}; bytes of text in shards of other "
            f"sizes can be counted for gpt2 only; {instead}"
        )


def _same_shards(collection: TokenCollection, suffix: str) -> Iterator[PlannedFile]:
    records = collection.manifest.shards if collection.manifest else ()
    stems = [PurePosixPath(record.file).stem for record in records]
    if len(set(stems)) < len(stems):  # of several folders within the folder
        stems = [f"{record.split}_{index:06d}" for index, record in enumerate(records)]
    ends = dict.fromkeys(collection.splits, 0)
    for record, stem in zip(records, stems, strict=True):
        start = ends[record.split]
        ends[record.split] += record.tokens
        yield PlannedFile(f"{stem}.{suffix}", record.split, start, ends[record.split], record)


def _document_shards(collection: TokenCollection, suffix: str, shard_tokens: int) -> Iterator[PlannedFile]:
    for split, tokens in collection.splits.items():
        spans = _document_spans(tokens.stream, shard_tokens, collection.tokenizer.end_of_text)
        for index, (start, stop) in enumerate(spans):
            yield PlannedFile(f"{split}_{index:06d}.{suffix}", split, start, stop)


def _llmc_shards(collection: TokenCollection, name: str, shard_tokens: int) -> Iterator[PlannedFile]:
    """Shards of exactly so many tokens, numbered as llm.c does: validation from 000000, training from 000001 on."""
    splits = sorted(collection.splits, key=lambda split: [VAL_SPLIT, TRAIN_SPLIT, split].index(split))
    numbers = count(0 if VAL_SPLIT in splits else 1)
    for split in splits:
        tokens = collection.splits[split].stream.tokens
        for start in range(0, max(tokens, 1), shard_tokens):
            file = f"{name}_{split}_{next(numbers):06d}{LLMC_SUFFIX}"
            yield PlannedFile(file, split, start, min(start + shard_tokens, tokens))


def _whole_splits(collection: TokenCollection) -> Iterator[PlannedFile]:
    for split, tokens in collection.splits.items():
        yield PlannedFile(f"{split}.bin", split, 0, tokens.stream.tokens)


def _document_spans(stream: Tokens, shard_tokens: int, end_of_text: int) -> Iterator[tuple[int, int]]:
    """Spans that end before the document that would take them past ``shard_tokens``; none cuts a document."""
    start = 0
    while stream.tokens - start > shard_tokens:
        limit = start + shard_tokens
        stop = _last_document_start(stream, start + 1, limit + 1, end_of_text)
        stop = stop or _first_document_start(stream, limit + 1, end_of_text)
        yield start, stop
        start = stop
    if start < stream.tokens or start == 0:
        yield start, stream.tokens


def _last_document_start(stream: Tokens, start: int, stop: int, end_of_text: int) -> int | None:
    while start < stop:
        length = min(CHUNK_TOKENS, stop - start)
        stop -= length
        found = np.flatnonzero(stream.read(stop, length) == end_of_text)
        if found.size:
            return stop + int(found[-1])
    return None


def _first_document_start(stream: Tokens, start: int, end_of_text: int) -> int:
    """The end of the stream, if none follows."""
    for at, length in chunks(start, stream.tokens):
        found = np.flatnonzero(stream.read(at, length) == end_of_text)
        if found.size:
            return at + int(found[0])
    return stream.tokens

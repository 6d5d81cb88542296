"""Check the options of a conversion, and plan which files will contain which tokens."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path, PurePosixPath
from typing import get_args

import numpy as np

from data_tools.errors import DataError
from data_tools.formats.collection import FILE_NAME, TokenCollection, Tokens, require_split_name
from data_tools.formats.flat_files import LLMC, NANOGPT
from data_tools.formats.opening import INPUT_FORMATS
from data_tools.options import AUTO, OutputFormat
from data_tools.shards.llmc import LLMC_SUFFIX, MAX_TOKENS
from data_tools.shards.manifest import NO_TOKEN, TRAIN_SPLIT, VAL_SPLIT, ShardRecord, TokenizerRecord, other_tokenizer
from data_tools.shards.writer import SHARD_FORMATS

DEFAULT_SHARD_TOKENS = 100_000_000
OUTPUT_FORMATS = get_args(OutputFormat)
READ_TOKENS = 1 << 20
_MAX_VOCAB_SIZE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """A request to convert tokens into a new folder.

    Attributes:
        source, source_format, split_of: the arguments ``path``, ``format`` and ``split_of`` of ``open_collection``.
        out: a new or empty folder.
        to: one of ``OUTPUT_FORMATS``.
        shard_tokens: the number of tokens per shard. If None, the conversion to npy or arrow keeps the shards of a
            source with a manifest. In all other cases, None means 100 million.
        name: for llm.c's format, the prefix of the new file names. None means the name of ``out``.
        workers: the number of threads. None means one per core.
        vocab_size: the vocabulary size of the tokens of another program. None means GPT-2's vocabulary.
        end_of_text: with ``vocab_size``, the id of the token that separates documents. None means that there is none.

    Raises:
        DataError: an option has an invalid value.
    """

    source: Path
    out: Path
    to: str
    source_format: str = AUTO
    split_of: Mapping[str, str] = field(default_factory=dict)
    shard_tokens: int | None = None
    name: str | None = None
    workers: int | None = None
    vocab_size: int | None = None
    end_of_text: int | None = None

    def __post_init__(self) -> None:
        if self.to not in OUTPUT_FORMATS:
            raise DataError(f"--to must be one of {', '.join(OUTPUT_FORMATS)}, it is {self.to!r}")
        if self.source_format not in (AUTO, *INPUT_FORMATS):
            raise DataError(f"--from must be one of {', '.join((AUTO, *INPUT_FORMATS))}, it is {self.source_format!r}")
        if self.shard_tokens is not None and self.to == NANOGPT:
            raise DataError("--shard-tokens: nanoGPT reads one file per split")
        if self.shard_tokens is not None and not 1 <= self.shard_tokens <= MAX_TOKENS:
            raise DataError(f"--shard-tokens must be at least 1 and at most {MAX_TOKENS}, it is {self.shard_tokens}")
        if self.workers is not None and self.workers < 1:
            raise DataError(f"--workers must be at least 1, it is {self.workers}")
        if self.name is not None and self.to != LLMC:
            raise DataError("--name is for --to llmc; other files are named by their split alone")
        if self.vocab_size is not None and not 1 <= self.vocab_size <= _MAX_VOCAB_SIZE:
            raise DataError(
                f"--vocab-size must be at least 1 and at most {_MAX_VOCAB_SIZE}, it is {self.vocab_size}; shards have "
                "tokens of 16 bits"
            )
        if self.end_of_text is not None and not 0 <= self.end_of_text < (self.vocab_size or 0):
            raise DataError(f"--end-of-text: {self.end_of_text} must be at least 0 and less than --vocab-size")
        if self.to == LLMC and not FILE_NAME.fullmatch(self.file_prefix):
            raise DataError(f"--name: {self.file_prefix!r} must have letters, digits and . _ - only")

    @property
    def tokenizer(self) -> TokenizerRecord | None:
        """Return the tokenizer of a source with another vocabulary than GPT-2's, or None."""
        if self.vocab_size is None:
            return None
        return other_tokenizer(self.vocab_size, NO_TOKEN if self.end_of_text is None else self.end_of_text)

    @property
    def file_prefix(self) -> str:
        """Return the prefix of the names of new files in llm.c's format."""
        return self.name or Path(os.path.abspath(self.out)).name


@dataclass(frozen=True)
class PlannedFile:
    """A file that a conversion will write, with the tokens ``start`` to ``stop - 1`` of a split.

    If a shard of the source contains exactly these tokens, ``record`` is the shard's entry in the manifest. The
    conversion then copies the mask and the counts of documents and bytes from this shard.
    """

    name: str
    split: str
    start: int
    stop: int
    record: ShardRecord | None = None


def plan_files(request: ConvertRequest, collection: TokenCollection, *, knows_bytes: bool) -> list[PlannedFile]:
    """Return the files that a conversion must write.

    ``knows_bytes`` says whether the bytes of text can be counted. It is True only for GPT-2's tokenizer.

    Raises:
        DataError: the new format cannot store all information, or a split has no tokens.
    """
    for split, tokens in collection.splits.items():
        require_split_name(split, str(collection.path))
        if not tokens.stream.tokens:
            raise DataError(f"{collection.path}: the split {split!r} has no tokens, so there is nothing to convert")
    if keeps_shards(request, collection):
        return list(_same_shards(collection, request.to))
    _require_nothing_lost(request, collection, knows_bytes)
    if request.to == NANOGPT:
        return [PlannedFile(f"{name}.bin", name, 0, it.stream.tokens) for name, it in collection.splits.items()]
    shard_tokens = request.shard_tokens or DEFAULT_SHARD_TOKENS
    if request.to == LLMC:
        return list(_llmc_shards(collection, request.file_prefix, shard_tokens))
    return list(_document_shards(collection, request.to, shard_tokens))


def keeps_shards(request: ConvertRequest, collection: TokenCollection) -> bool:
    """Return whether the conversion writes one new shard per shard of the source."""
    return collection.manifest is not None and request.to in SHARD_FORMATS and request.shard_tokens is None


def read_ranges(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Divide the tokens ``start`` to ``stop - 1`` into ranges that fit in memory. Yield (start, length) per range."""
    return ((at, min(READ_TOKENS, stop - at)) for at in range(start, stop, READ_TOKENS))


def _require_nothing_lost(request: ConvertRequest, collection: TokenCollection, knows_bytes: bool) -> None:
    instead = f"--to {' or '.join(SHARD_FORMATS)} without --shard-tokens keeps the shards as they are"
    for shard in collection.shards:
        if shard.mask_file:
            raise DataError(
                f"{collection.path / shard.mask_file} says which tokens are scored, which would be lost; {instead}"
            )
    if request.to != NANOGPT and collection.manifest and not knows_bytes:
        raise DataError(
            f"{collection.path} is of the tokenizer {collection.tokenizer.name!r}; bytes of text in shards of other "
            f"sizes can be counted for gpt2 only; {instead}"
        )


def _same_shards(collection: TokenCollection, suffix: str) -> Iterator[PlannedFile]:
    stems = [PurePosixPath(record.file).stem for record in collection.shards]
    if len(set(stems)) < len(stems):  # shards in several subfolders have equal names
        stems = [f"{record.split}_{index:06d}" for index, record in enumerate(collection.shards)]
    ends = dict.fromkeys(collection.splits, 0)
    for record, stem in zip(collection.shards, stems, strict=True):
        start = ends[record.split]
        ends[record.split] += record.tokens
        yield PlannedFile(f"{stem}.{suffix}", record.split, start, ends[record.split], record)


def _document_shards(collection: TokenCollection, suffix: str, shard_tokens: int) -> Iterator[PlannedFile]:
    for split, tokens in collection.splits.items():
        ranges = _document_ranges(tokens.stream, shard_tokens, collection.tokenizer.end_of_text)
        for index, (start, stop) in enumerate(ranges):
            yield PlannedFile(f"{split}_{index:06d}.{suffix}", split, start, stop)


def _llmc_shards(collection: TokenCollection, name: str, shard_tokens: int) -> Iterator[PlannedFile]:
    """Yield shards of ``shard_tokens`` tokens. The first validation shard has the number 0 in its name.

    If there is no validation shard, the numbers begin at 1.
    """
    splits = sorted(collection.splits, key=lambda split: [VAL_SPLIT, TRAIN_SPLIT, split].index(split))
    numbers = count(0 if VAL_SPLIT in splits else 1)
    for split in splits:
        tokens = collection.splits[split].stream.tokens
        for start in range(0, tokens, shard_tokens):
            file = f"{name}_{split}_{next(numbers):06d}{LLMC_SUFFIX}"
            yield PlannedFile(file, split, start, min(start + shard_tokens, tokens))


def _document_ranges(stream: Tokens, shard_tokens: int, end_of_text: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of whole documents with at most ``shard_tokens``. A larger document gets its own range."""
    start = 0
    while stream.tokens - start > shard_tokens:
        limit = start + shard_tokens
        stop = _last_document_start(stream, start + 1, limit + 1, end_of_text)
        stop = stop or _first_document_start(stream, limit + 1, end_of_text)
        yield start, stop
        start = stop
    if start < stream.tokens:
        yield start, stream.tokens


def _last_document_start(stream: Tokens, start: int, stop: int, end_of_text: int) -> int | None:
    while start < stop:
        length = min(READ_TOKENS, stop - start)
        stop -= length
        found = np.flatnonzero(stream.read(stop, length) == end_of_text)
        if found.size:
            return stop + int(found[-1])
    return None


def _first_document_start(stream: Tokens, start: int, end_of_text: int) -> int:
    """Return the position of the first document at or after ``start``, or the end of the stream."""
    for at, length in read_ranges(start, stream.tokens):
        found = np.flatnonzero(stream.read(at, length) == end_of_text)
        if found.size:
            return at + int(found[0])
    return stream.tokens

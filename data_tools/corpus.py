"""Stage 1 as a recipe: documents -> splits -> batches -> tokens in parallel -> shards and manifest.

The bytes of the result depend on the request alone, not on the number of workers or on interruptions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice

from data_tools.errors import DataError
from data_tools.output import OutputFolder, load_complete, open_output
from data_tools.parallel import ordered_map
from data_tools.request import TokenizeRequest, available_cores
from data_tools.shards import Manifest, ShardRecord
from data_tools.sources import Source, open_source
from data_tools.split import assign_splits
from data_tools.tokenizer import EncodedDocuments, load_tokenizer, replace_lone_surrogates, utf8_length

__all__ = ["Progress", "TokenizeRequest", "find_complete", "tokenize_corpus"]

# Large enough that sending a batch to a worker costs little, small enough that many fit into memory.
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Progress:
    """What has been tokenized so far, finished shards of an interrupted run included."""

    documents: int
    tokens: int
    utf8_bytes: int


@dataclass(frozen=True)
class _Batch:
    """Documents that are encoded together; ``splits`` has one entry a document."""

    splits: list[str]
    texts: list[str]


@dataclass(frozen=True)
class _EncodedBatch:
    splits: list[str]
    documents: EncodedDocuments


def find_complete(request: TokenizeRequest) -> Manifest | None:
    """The manifest, if the folder already holds all that the request would make.

    Raises:
        DataError: the request is unusable, or the folder was completed by another request or damaged since.
    """
    return load_complete(request.out, request.identity(open_source(request)))


def tokenize_corpus(request: TokenizeRequest, on_progress: Callable[[Progress], None] | None = None) -> Manifest:
    """Tokenize a source into a folder of shards, continuing what the same request left unfinished.

    Returns at once when the folder is complete already. A corpus of a single document has no validation split.

    Args:
        request: what to do. With more than one worker, a calling script needs ``if __name__ == "__main__"``.
        on_progress: called before the first batch, with what an interrupted run had finished, and after each.

    Returns:
        The manifest that was written.

    Raises:
        DataError: the request, a document or the folder is unusable, or the disk is full; one line.
    """
    source = open_source(request)
    identity = request.identity(source)
    if manifest := load_complete(request.out, identity):
        return manifest
    documents = _read_documents(source, request)
    # A corpus without a document must leave no trace, so one is read before the folder is touched.
    if (first := next(documents, None)) is None:
        raise DataError(f"--source {request.source} has no document with text in it; there is nothing to tokenize")
    with open_output(request.out, identity, format=request.format, shard_tokens=request.shard_tokens) as output:
        _fill(output, chain([first], documents), request, on_progress or _ignore)
        return output.complete()


def _fill(
    output: OutputFolder,
    documents: Iterable[str],
    request: TokenizeRequest,
    on_progress: Callable[[Progress], None],
) -> None:
    """Encode every document that is not in a finished shard, and append it to its split."""
    assigned = assign_splits(documents, val_fraction=request.val_fraction, seed=request.seed)
    batches = _group(_skip_finished(assigned, output.finished))
    progress = _progress_of(shard for shards in output.finished.values() for shard in shards)
    on_progress(progress)
    with closing(ordered_map(_encode, batches, request.workers or available_cores())) as encoded_batches:
        for batch in encoded_batches:
            _append(output, batch)
            progress = _advance(progress, batch.documents)
            on_progress(progress)


def _read_documents(source: Source, request: TokenizeRequest) -> Iterator[str]:
    """The documents that have text, up to the limits of the request."""
    documents: Iterator[str] = filter(None, source.documents())
    if request.limit_bytes is not None:
        documents = _limit_bytes(documents, request.limit_bytes)
    return islice(documents, request.limit_documents)


def _limit_bytes(documents: Iterator[str], limit_bytes: int) -> Iterator[str]:
    read_bytes = 0
    for document in documents:
        yield document
        read_bytes += utf8_length(replace_lone_surrogates(document))
        if read_bytes >= limit_bytes:
            return


def _skip_finished(
    assigned: Iterator[tuple[str, str]], finished: dict[str, tuple[ShardRecord, ...]]
) -> Iterator[tuple[str, str]]:
    """Leave out the first documents of each split, as many as its finished shards hold."""
    to_skip = {split: sum(shard.documents for shard in shards) for split, shards in finished.items()}
    seen: Counter[str] = Counter()
    for split, document in assigned:
        seen[split] += 1
        if seen[split] > to_skip[split]:
            yield split, document
    for split, documents in to_skip.items():
        if seen[split] < documents:
            raise DataError(
                f"the source changed since the interrupted run: it has {seen[split]} documents for {split}, "
                f"{documents} were written; delete the output folder to start again"
            )


def _group(assigned: Iterable[tuple[str, str]]) -> Iterator[_Batch]:
    batch = _Batch([], [])
    characters = 0
    for split, document in assigned:
        batch.splits.append(split)
        batch.texts.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch = _Batch([], [])
            characters = 0
    if batch.texts:
        yield batch


def _encode(batch: _Batch) -> _EncodedBatch:
    return _EncodedBatch(batch.splits, load_tokenizer().encode_documents(batch.texts))


def _append(output: OutputFolder, batch: _EncodedBatch) -> None:
    start = 0
    encoded = batch.documents
    for split, tokens, utf8_bytes in zip(
        batch.splits, encoded.token_counts.tolist(), encoded.utf8_bytes.tolist(), strict=True
    ):
        output.append(split, encoded.tokens[start : start + tokens], utf8_bytes)
        start += tokens


def _progress_of(shards: Iterable[ShardRecord]) -> Progress:
    totals = Progress(0, 0, 0)
    for shard in shards:
        totals = Progress(
            totals.documents + shard.documents,
            totals.tokens + shard.tokens,
            totals.utf8_bytes + shard.utf8_bytes,
        )
    return totals


def _advance(progress: Progress, encoded: EncodedDocuments) -> Progress:
    return Progress(
        progress.documents + encoded.token_counts.size,
        progress.tokens + encoded.tokens.size,
        progress.utf8_bytes + int(encoded.utf8_bytes.sum()),
    )


def _ignore(progress: Progress) -> None:
    """The observer of those who pass none."""

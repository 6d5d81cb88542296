"""Stage 1 as a recipe: source -> chunks -> tokens in parallel -> shards and manifest.

The bytes of the shards depend on the request alone, not on what ran the chunks, how many at a time, or interruptions.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import closing
from datetime import datetime, timezone
from typing import Any, Protocol

from data_tools.corpus.chunks import Chunk, plan_chunks
from data_tools.corpus.duplicates import write_repeated
from data_tools.corpus.engines import run_chunks, workers_of
from data_tools.corpus.estimate import Estimate, estimate, expect_room
from data_tools.corpus.output import OutputFolder, fingerprints_name, load_complete, open_output, repeated_name
from data_tools.corpus.records import Progress, progress_of
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.worker import Job, encode_chunk, fingerprint_chunk
from data_tools.encoding.encoders import REFERENCE_ENCODER, choose_encoder, encoder_version
from data_tools.errors import DataError
from data_tools.shards import Manifest
from data_tools.sources import Source, open_source
from data_tools.storage.files import sha256_of_json

__all__ = ["Observer", "Progress", "TokenizeRequest", "find_complete", "tokenize_corpus", "tokenize_share"]


class Observer(Protocol):
    """Told how a run gets on."""

    def planned(self, estimate: Estimate) -> None:
        """Before the first chunk."""
        ...

    def progressed(self, progress: Progress) -> None:
        """At the start, with what an interrupted run had finished, and then a few times a second."""
        ...


class _Nobody:
    """The observer of those who pass none."""

    def planned(self, estimate: Estimate) -> None:
        """Nothing."""

    def progressed(self, progress: Progress) -> None:
        """Nothing."""


def find_complete(request: TokenizeRequest) -> Manifest | None:
    """The manifest, if the folder already holds all that the request would make.

    Raises:
        DataError: the request is unusable, or the folder was completed by another request or damaged since.
    """
    return load_complete(request.out, request.identity(open_source(request)))


def tokenize_corpus(request: TokenizeRequest, observer: Observer | None = None) -> Manifest:
    """Tokenize a source into a folder of shards, continuing what the same request left unfinished.

    Returns at once when the folder is complete already. A corpus of a single document has no validation split.

    Args:
        request: what to do. With more than one worker, a calling script needs ``if __name__ == "__main__"``.

    Returns:
        The manifest that was written.

    Raises:
        DataError: the request, a document or the folder is unusable, or the disk is full; one line.
    """
    source = open_source(request)
    identity = request.identity(source)
    if manifest := load_complete(request.out, identity):
        return manifest
    with open_output(request.out, identity, shared=False) as output:
        if manifest := load_complete(request.out, identity):  # meanwhile
            return manifest
        run = _Run(request, source, output, observer or _Nobody())
        output.remove_leftovers()
        run.expect_room()
        run.leave_out_repeated(run.chunks)
        run.encode(run.chunks)
        return output.complete(run.chunks, run.made())


def tokenize_share(
    request: TokenizeRequest, share: int, shares: int, observer: Observer | None = None
) -> Manifest | None:
    """Do the chunks ``share``, ``share + shares``, ... of a request, while other processes do the others.

    Whoever ends last writes the manifest. With ``deduplicate`` the documents must be compared before any is encoded:
    the first call of each share fingerprints its documents, a second one, after all first ones, encodes them.

    Returns:
        The manifest; None: other shares are not done yet.

    Raises:
        DataError: as ``tokenize_corpus``.
    """
    source = open_source(request)
    identity = request.identity(source)
    if manifest := load_complete(request.out, identity):
        return manifest
    with open_output(request.out, identity, shared=True) as output:
        if manifest := load_complete(request.out, identity):  # meanwhile
            return manifest
        run = _Run(request, source, output, observer or _Nobody())
        own = run.chunks[share::shares]
        if not run.leave_out_repeated(own):
            return None
        run.encode(own)
        return output.complete_if_last(run.chunks, run.made)


class _Run:
    """One call, on the chunks of one request."""

    def __init__(self, request: TokenizeRequest, source: Source, output: OutputFolder, observer: Observer) -> None:
        self._request = request
        self._source = source
        self._output = output
        self._observer = observer
        self._encoder = choose_encoder(request.encoder)
        self.chunks = output.plan(lambda: plan_chunks(source, request))
        output.look_for_finished(self.chunks)
        self._job = Job(request, self._encoder, len(self.chunks) == 1, sha256_of_json(request.identity(source)))

    def expect_room(self) -> None:
        """Estimate the work, tell the observer, and refuse what does not fit on the disk."""
        request = self._request
        limited = request.limit_documents is not None or request.limit_bytes is not None
        free = self._output.folder.free_bytes()
        estimated = estimate(self._source, self.chunks, free, workers_of(request), limited=limited)
        if estimated is None:
            raise DataError(f"--source {request.source} has no document with text in it; there is nothing to tokenize")
        self._observer.planned(estimated)
        expect_room(estimated, 2 * progress_of(self._output.finished.values()).tokens, f"--out {request.out}")

    def leave_out_repeated(self, own: Iterable[Chunk]) -> bool:
        """Compare documents if the request asks for it; False: others have not fingerprinted theirs yet."""
        if self._request.deduplicate != "exact":
            return True
        folder = self._output.folder
        names = folder.names()
        missing = [chunk for chunk in own if fingerprints_name(chunk) not in names]
        with closing(run_chunks(fingerprint_chunk, self._job, missing, _ignore)) as done:
            for _ in done:
                pass
        if missing:
            names = folder.names()
        if any(fingerprints_name(chunk) not in names for chunk in self.chunks):
            return False
        if any(repeated_name(chunk) not in names for chunk in self.chunks):
            write_repeated(folder, self.chunks)
        return True

    def encode(self, chunks: Iterable[Chunk]) -> None:
        """Do what is not finished of these chunks."""
        finished = self._output.finished
        progress = progress_of(finished.values())
        self._observer.progressed(progress)

        def report(documents: int, tokens: int, utf8_bytes: int) -> None:
            nonlocal progress
            progress = progress.plus(documents, tokens, utf8_bytes)
            self._observer.progressed(progress)

        unfinished = [chunk for chunk in chunks if chunk.index not in finished]
        with closing(run_chunks(encode_chunk, self._job, unfinished, report)) as records:
            for record in records:
                finished[record.index] = record

    def made(self) -> dict[str, Any]:
        """When and with what, for the manifest."""
        return {
            "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "encoder": encoder_version(self._encoder),
            "reference": encoder_version(REFERENCE_ENCODER),
            "checked_documents": sum(record.checked for record in self._output.finished.values()),
            "python": platform.python_version(),
            "engine": self._request.engine,
        }


def _ignore(documents: int, tokens: int, utf8_bytes: int) -> None:
    """Fingerprinting is not told of."""

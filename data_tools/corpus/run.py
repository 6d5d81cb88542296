"""Execute a tokenize request.

The bytes of the shards do not depend on the number of workers, on the machines, or on interruptions.
"""

import glob
import os
from collections.abc import Sequence
from contextlib import closing
from fnmatch import fnmatch
from pathlib import Path

from data_tools.corpus.chunks import Chunk, ChunkRecord, plan_chunks
from data_tools.corpus.duplicates import write_repeated
from data_tools.corpus.engines import ChunkWork, run_chunks
from data_tools.corpus.estimate import Estimate, check_free_space, estimate_run
from data_tools.corpus.identity import identity_of
from data_tools.corpus.output import OutputFolder, load_complete, open_output
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.worker import Job, changed_source_error, encode_chunk, fingerprint_chunk
from data_tools.corpus.worker_server import start_worker_server
from data_tools.encoding.encoders import choose_encoder
from data_tools.errors import DataError
from data_tools.formatting import count_of
from data_tools.shards.contents import Contents
from data_tools.shards.manifest import MANIFEST_NAME, Manifest
from data_tools.sources import open_source
from data_tools.sources.files import FileSizes
from data_tools.storage.files import is_remote
from data_tools.storage.json_values import sha256_of_json
from data_tools.storage.remote import require_writable_url

__all__ = ["Observer", "TokenizeRequest", "find_complete", "tokenize_corpus", "tokenize_share"]


class Observer:
    """Receives messages, the ``Estimate`` and the progress of one ``TokenizeRequest``. This base class ignores them."""

    def noticed(self, line: str) -> None:
        """Receive a message for the user about the input.

        All calls of this method come before ``planned``, except the message that new files appeared meanwhile.
        """

    def planned(self, estimate: Estimate) -> None:
        """Receive the estimate before the first chunk is processed. ``tokenize_share`` does not call this method."""

    def progressed(self, progress: Contents) -> None:
        """Receive how many documents, tokens and bytes of text are encoded so far.

        For a continued request, the numbers include the work before the interruption.
        """


def find_complete(request: TokenizeRequest) -> Manifest | None:
    """Return the manifest in the output folder of a request, or None if the folder is not complete.

    Raises:
        DataError: the folder is damaged or belongs to another request.
    """
    source = open_source(request)
    _require_outside_input(request)
    return load_complete(request.out, identity_of(request, source))


def tokenize_corpus(request: TokenizeRequest, observer: Observer | None = None) -> Manifest:
    """Tokenize a source into a folder of shards, and return the manifest.

    If an earlier call for the same request was interrupted, this call continues the work. If the folder is already
    complete, this call only checks the folder. With more than one worker, the calling script needs
    ``if __name__ == "__main__"``.

    Raises:
        DataError: the source or a document cannot be read, the folder cannot be used, or the disk is full.
    """
    manifest = _tokenize(request, None, observer or Observer())
    assert manifest is not None, "only a share leaves chunks to others"
    return manifest


def tokenize_share(
    request: TokenizeRequest, share: int, shares: int, observer: Observer | None = None
) -> Manifest | None:
    """Encode one share of a request: the chunks whose index modulo ``shares`` is ``share``.

    Each process that shares the output folder calls this function with its own ``share``, from 0 to ``shares - 1``. The
    last call writes and returns the manifest. The earlier calls return None.

    If ``deduplicate`` is ``exact``, each share needs two calls. The first call hashes the documents. The second call
    encodes the documents, and must come after the first calls of all shares.
    """
    return _tokenize(request, (share, shares), observer or Observer())


def _tokenize(request: TokenizeRequest, share: tuple[int, int] | None, observer: Observer) -> Manifest | None:
    source = open_source(request)
    _require_outside_input(request)
    identity = identity_of(request, source)
    if manifest := load_complete(request.out, identity):
        return manifest
    if is_remote(str(request.out)):
        require_writable_url(str(request.out), "--out")
    with open_output(request.out, identity, shared=share is not None) as output:
        if manifest := load_complete(request.out, identity):  # another process completed the folder before this lock
            return manifest
        encoder = choose_encoder(request.encoder)
        output.plan(lambda: plan_chunks(source, request))
        if len(output.chunks) > 1:
            start_worker_server(request)
        job = Job(request, encoder, len(output.chunks) == 1, sha256_of_json(identity))
        for line in source.notices():
            observer.noticed(line)
        if share is None:
            chunks = output.chunks
            output.remove_leftovers()
            estimate = estimate_run(request, source, chunks, output.folder.free_bytes())
            observer.planned(estimate)
            check_free_space(estimate, 2 * output.progress.tokens, f"--out {request.out}")
        else:
            chunks = output.chunks[share[0] :: share[1]]
        if request.deduplicate == "exact" and not _find_repeated(job, chunks, output):
            return None
        _encode(job, chunks, output, observer)
        _check_files_again(request, source.files, observer)
        return output.complete(encoder=encoder, engine=request.engine)


def _check_files_again(request: TokenizeRequest, files: FileSizes, observer: Observer) -> None:
    """Compare the files of the source with ``files``, the files at the start. Tell the observer about new files.

    A file that became shorter may end between two documents, where its reader finds no error.

    Raises:
        DataError: a file has changed its size or is missing.
    """
    now = dict(open_source(request).files)
    if any(now.pop(path, None) != size for path, size in files):
        raise changed_source_error(request)
    if now:
        new = f"{count_of(len(now), 'file')} appeared while this command read the others, such as {min(now)}"
        observer.noticed(f"{new}; the shards do not contain them")


def _require_outside_input(request: TokenizeRequest) -> None:
    """Raise DataError if the source would find the shards in ``request.out`` and read them as documents."""
    if is_remote(str(request.out)) or request.source == "parquet":  # no file in the output folder ends in .parquet
        return
    for text in request.inputs:
        if not is_remote(text) and _finds_files_in(text, request.out):
            raise DataError(
                f"--out {request.out} is inside --input {text}, so the shards would be read as documents; name a "
                "folder outside of it"
            )


def _finds_files_in(text: str, out: Path | str) -> bool:
    """Return whether an input (a folder, a file or a glob pattern) contains files that stage 1 writes to ``out``."""
    target = Path(os.path.realpath(out))
    if os.path.isdir(text):
        return target.is_relative_to(os.path.realpath(text))
    parts = Path(text).parts
    fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    folder = os.path.realpath(Path(*parts[:fixed]))
    if not target.is_relative_to(folder):
        return False
    found = [(*target.relative_to(folder).parts, name) for name in (MANIFEST_NAME, "x.npy")]
    return any(_matches(path, parts[fixed:]) for path in found)


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path match the parts of a glob pattern, in which ``**`` stands for any folders."""
    if not pattern or not path:
        return not pattern and not path
    if pattern[0] == "**":
        return any(_matches(path[skipped:], pattern[1:]) for skipped in range(len(path) + 1))
    return fnmatch(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _find_repeated(job: Job, chunks: Sequence[Chunk], output: OutputFolder) -> bool:
    """Hash the documents of ``chunks``. Then find the repeated documents of all chunks.

    If hashes of other shares are missing, the function returns False and finds no repeated documents.
    """
    folder = output.folder
    names = folder.names()
    missing = [chunk for chunk in chunks if chunk.fingerprints_file not in names]
    with closing(run_chunks(fingerprint_chunk, job, missing, lambda progress: None)) as results:
        for _ in results:
            pass
    names = folder.names()
    if any(chunk.fingerprints_file not in names for chunk in output.chunks):
        return False
    if any(chunk.repeated_file not in names for chunk in output.chunks):
        write_repeated(folder, output.chunks)
    return True


def _encode(job: Job, chunks: Sequence[Chunk], output: OutputFolder, observer: Observer) -> None:
    progress = output.progress
    observer.progressed(progress)

    def report(new: Contents) -> None:
        nonlocal progress
        progress += new
        observer.progressed(progress)

    unfinished = [chunk for chunk in chunks if chunk.index not in output.finished]
    work: ChunkWork[ChunkRecord] = encode_chunk
    with closing(run_chunks(work, job, unfinished, report)) as records:
        for record in records:
            output.finished[record.index] = record

"""Whether shards are still what their manifest says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data_tools.errors import DataError
from data_tools.shards.contents import Contents, Vocabulary
from data_tools.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, load_manifest
from data_tools.shards.reader import expect_flags, map_mask, map_shard
from data_tools.storage.files import sha256_of_file
from data_tools.threads import Advance, map_threads, no_progress

# Between two looks at whether another thread has failed.
_SCAN_TOKENS = 1 << 22


def verify(folder: Path | str, workers: int | None = None, advance: Advance = no_progress) -> Manifest:
    """Recompute all that the manifest says about its shards: hashes, counts, ids inside the vocabulary, flags of masks.

    Bytes of text are counted for GPT-2's own vocabulary, and not where a mask says that some of it is not scored.

    Args:
        folder: with the manifest.
        workers: threads, each at one shard at a time; None: one for each core.
        advance: told of the bytes of files that are verified.

    Raises:
        DataError: names the first shard that differs, and how.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    check = partial(_check_shard, folder, Vocabulary(manifest.tokenizer))
    map_threads(check, manifest.shards, workers, advance)
    return manifest


def expect_unchanged(folder: Path, shard: ShardRecord, advance: Advance = no_progress) -> None:
    """Hash one shard, and its mask if it has one.

    Raises:
        DataError: a SHA-256 is not the one in the manifest.
    """
    _expect_sha256(folder / shard.file, shard.sha256, advance)
    if shard.mask_file and shard.mask_sha256:
        _expect_sha256(folder / shard.mask_file, shard.mask_sha256, advance)


def _expect_sha256(path: Path, sha256: str, advance: Advance) -> None:
    try:
        unchanged = sha256_of_file(path, advance) == sha256
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not unchanged:
        raise DataError(f"{path}: its SHA-256 is not the one in {MANIFEST_NAME}; delete the folder and tokenize again")


def _check_shard(folder: Path, vocabulary: Vocabulary, shard: ShardRecord, advance: Advance) -> None:
    path = folder / shard.file
    # Hashed, then looked at. In turns of a few megabytes, with one read of the file, is not faster.
    pieces = map_shard(folder, shard)
    expect_unchanged(folder, shard, advance)
    contents = Contents()
    for piece in pieces:
        for start in range(0, piece.size, _SCAN_TOKENS):
            contents += vocabulary.count(piece[start : start + _SCAN_TOKENS], path)
            advance(0)
    if contents.documents != shard.documents:
        raise DataError(f"{path} holds {contents.documents} documents, {MANIFEST_NAME} says {shard.documents}")
    if shard.mask_file:
        expect_flags(map_mask(folder, shard), str(folder / shard.mask_file))
    elif vocabulary.knows_bytes and contents.utf8_bytes != shard.utf8_bytes:
        raise DataError(f"{path} holds {contents.utf8_bytes} bytes of text, {MANIFEST_NAME} says {shard.utf8_bytes}")

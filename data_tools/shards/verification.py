"""Verify that token shards match their manifest."""

from functools import partial
from pathlib import Path

from data_tools.errors import DataError, one_line_read_errors
from data_tools.shards.contents import Contents, Vocabulary
from data_tools.shards.manifest import MANIFEST_NAME, TOKENIZE_AGAIN, Manifest, ShardRecord, load_manifest
from data_tools.shards.mapping import map_mask, map_shard, require_flags
from data_tools.storage.sha256 import sha256_of_file
from data_tools.threads import Advance, map_threads, no_progress


def verify(folder: Path | str, workers: int | None = None, advance: Advance = no_progress) -> Manifest:
    """Check that the hashes and the contents of the shards match the manifest. Return the manifest.

    The contents are the numbers of documents, tokens and bytes of text. The number of bytes is not checked if a shard
    has a mask, or if the tokenizer is not GPT-2's.

    Args:
        workers: the number of threads. None means one per core.
        advance: receives the number of bytes verified since its last call.

    Raises:
        DataError: a shard does not match, a token is outside the vocabulary, or a mask contains a value that is neither
            0 nor 1.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    check = partial(_check_shard, folder, Vocabulary(manifest.tokenizer))
    map_threads(check, manifest.shards, workers, advance)
    return manifest


def require_unchanged(folder: Path, shard: ShardRecord, advance: Advance = no_progress) -> None:
    """Raise DataError if the SHA-256 of a shard or its mask differs from the manifest."""
    for name, sha256 in ((shard.file, shard.sha256), (shard.mask_file, shard.mask_sha256)):
        if name is None:
            continue
        with one_line_read_errors(folder / name):
            unchanged = sha256_of_file(folder / name, advance) == sha256
        if not unchanged:
            raise DataError(f"{folder / name}: its SHA-256 is not the one in {MANIFEST_NAME}; {TOKENIZE_AGAIN}")


def _check_shard(folder: Path, vocabulary: Vocabulary, shard: ShardRecord, advance: Advance) -> None:
    path = folder / shard.file
    # Hashing and counting in one pass over the file is not faster than in two passes.
    pieces = map_shard(folder, shard)
    require_unchanged(folder, shard, advance)
    contents = Contents()
    for piece in pieces:
        contents += vocabulary.count(piece, path, advance)
    if contents.documents != shard.documents:
        raise DataError(f"{path} holds {contents.documents} documents, {MANIFEST_NAME} says {shard.documents}")
    if shard.mask_file:
        require_flags(map_mask(folder, shard), str(folder / shard.mask_file))
    elif vocabulary.knows_bytes and contents.utf8_bytes != shard.utf8_bytes:
        raise DataError(f"{path} holds {contents.utf8_bytes} bytes of text, {MANIFEST_NAME} says {shard.utf8_bytes}")

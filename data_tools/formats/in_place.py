"""Training from llm.c's shards where they are: a manifest beside them, and no token copied."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from data_tools.errors import DataError, one_line_write_errors
from data_tools.formats.collection import conversion_record
from data_tools.formats.detection import open_collection
from data_tools.formats.flat_files import LLMC, map_llmc_file
from data_tools.formats.layout import chunks
from data_tools.shards import MANIFEST_NAME, Manifest, ShardRecord, SourceRecord
from data_tools.shards.contents import Contents, Vocabulary
from data_tools.storage.atomic import write_json_durably
from data_tools.storage.files import sha256_of_file
from data_tools.threads import Advance, map_threads, no_progress


def adopt_in_place(
    folder: Path, split_of: Mapping[str, str] | None = None, workers: int | None = None, advance: Advance = no_progress
) -> Manifest:
    """Write a manifest beside llm.c's shards, which makes their folder one of ours; the shards stay untouched.

    Args:
        folder: with llm.c's shards.
        split_of: splits of files by their names, where the names do not tell.
        workers: threads; None: one for each core.
        advance: told of the bytes of files that were read.

    Raises:
        DataError: the folder has a manifest, no such shards, a damaged one, or cannot be written.
    """
    manifest = folder / MANIFEST_NAME
    if manifest.exists():
        raise DataError(f"{folder} has a {MANIFEST_NAME} already; nothing is left to do")
    if not folder.is_dir():
        raise DataError(f"--in-place: {folder} is no folder")
    collection = open_collection(folder, split_of=split_of)
    if collection.format != LLMC:
        raise DataError(
            f"--in-place: the files of {folder} are of {collection.format}; only llm.c's are used as they are"
        )
    files = [(split, file.path) for split, members in collection.splits.items() for file in members.files]
    describe = partial(_describe, Vocabulary(collection.tokenizer))
    shards = tuple(map_threads(describe, files, workers, advance))
    # The folder may move: where it stands now says nothing about where the tokens came from.
    options = {key: value for key, value in collection.source.options.items() if key != "input"}
    content = Manifest(
        collection.tokenizer, SourceRecord(LLMC, options), {"format": LLMC}, shards, made=conversion_record(LLMC)
    )
    with one_line_write_errors(manifest):
        write_json_durably(manifest, content.to_json())
    return content


def _describe(vocabulary: Vocabulary, file: tuple[str, Path], advance: Advance) -> ShardRecord:
    split, path = file
    tokens = map_llmc_file(path)
    try:
        sha256 = sha256_of_file(path, advance)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    contents = Contents()
    for start, length in chunks(0, tokens.size):
        contents += vocabulary.count(tokens[start : start + length], path)
        advance(0)
    return ShardRecord(path.name, split, tokens.size, contents.documents, contents.utf8_bytes, sha256)

"""From tokens of any format to a new folder of another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import one_line_write_errors
from data_tools.formats.collection import TokenCollection, conversion_record
from data_tools.formats.detection import open_collection
from data_tools.formats.flat_files import NANOGPT
from data_tools.formats.layout import keeps_shards, plan_files
from data_tools.formats.request import DEFAULT_SHARD_TOKENS, ConvertRequest
from data_tools.formats.staging import require_new
from data_tools.formats.writing import FileWriter
from data_tools.shards import MANIFEST_NAME, Manifest, ShardRecord, verify
from data_tools.shards.contents import Vocabulary
from data_tools.storage.atomic import atomic_folder, write_json_durably
from data_tools.threads import Advance, map_threads, no_progress


@dataclass(frozen=True)
class Conversion:
    """What was made: the format that was read, and a record of each file that was written."""

    source_format: str
    files: tuple[ShardRecord, ...]


def convert(request: ConvertRequest, written: Advance = no_progress, verified: Advance = no_progress) -> Conversion:
    """Convert; the new folder appears whole or not at all.

    Tokens and their order stay as they are, but for the separators of Megatron's files (see ``MegatronTokens``). A
    folder of ours is verified first. All but nanoGPT's files get a manifest beside them.

    Args:
        request: what to convert into what.
        written: told of the bytes of tokens that were written.
        verified: told of the bytes of a folder of ours that were verified.

    Raises:
        DataError: an input is damaged, the formats do not go together, or the folder cannot be written.
    """
    require_new(request.out)
    collection = open_collection(request.source, request.source_format, request.split_of)
    vocabulary = Vocabulary(collection.tokenizer)
    planned = plan_files(request, collection, knows_bytes=vocabulary.knows_bytes)
    if collection.manifest:
        verify(collection.path, request.workers, verified)
    require_new(request.out)  # again, because verifying takes time
    with one_line_write_errors(request.out), atomic_folder(request.out) as folder:
        writer = FileWriter(folder, collection, vocabulary, raw=request.to == NANOGPT)
        files = tuple(map_threads(writer.write, planned, request.workers, written))
        if request.to != NANOGPT:
            _write_manifest(folder / MANIFEST_NAME, request, collection, files)
    return Conversion(collection.format, files)


def _write_manifest(
    path: Path, request: ConvertRequest, collection: TokenCollection, files: tuple[ShardRecord, ...]
) -> None:
    original = collection.manifest
    settings = {**(original.settings if original else {}), "format": request.to}
    if not keeps_shards(request, collection):
        settings["shard_tokens"] = request.shard_tokens or DEFAULT_SHARD_TOKENS
    manifest = Manifest(
        collection.tokenizer,
        collection.source,
        settings,
        files,
        report=original.report if original else None,
        made={**(original.made or {} if original else {}), **conversion_record(collection.format)},
    )
    with one_line_write_errors(path):
        write_json_durably(path, manifest.to_json())

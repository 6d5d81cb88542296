"""Convert token files between formats, or write a manifest for existing shards of llm.c or build-nanogpt."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.arrays import TokenArray
from data_tools.errors import DataError, list_names, one_line_read_errors, one_line_write_errors
from data_tools.formats.collection import TokenCollection
from data_tools.formats.flat_files import LLMC, NANOGPT, NPY, map_llmc_file, map_npy_file
from data_tools.formats.opening import open_collection
from data_tools.formats.plan import (
    DEFAULT_SHARD_TOKENS,
    ConvertRequest,
    PlannedFile,
    keeps_shards,
    plan_files,
    read_ranges,
)
from data_tools.options import AUTO
from data_tools.shards.contents import Vocabulary
from data_tools.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, SourceRecord, load_manifest, mask_file_of
from data_tools.shards.verification import verify
from data_tools.shards.writer import OpenFormat, ShardWriter, write_flat
from data_tools.storage.atomic import atomic_folder, write_json_durably
from data_tools.storage.files import is_writable, require_writable
from data_tools.storage.sha256 import sha256_of_file
from data_tools.threads import Advance, map_threads, no_progress


@dataclass(frozen=True)
class Conversion:
    """The format that a conversion read, and a record of each file that it wrote."""

    source_format: str
    files: tuple[ShardRecord, ...]


def convert(request: ConvertRequest, written: Advance = no_progress, verified: Advance = no_progress) -> Conversion:
    """Convert tokens into a new folder. If the conversion fails, the folder is not created.

    The tokens do not change. In Megatron's files, only ``END_OF_TEXT`` can change (see ``open_megatron_pair``). Shards
    with a manifest are verified first. A folder for nanoGPT gets no manifest.

    Args:
        written: receives the number of bytes written since its last call.
        verified: receives the number of bytes verified since its last call.

    Raises:
        DataError: the new format cannot store all information of the source.
    """
    _require_new(request.out)
    collection = open_collection(request.source, request.source_format, request.split_of, request.tokenizer)
    vocabulary = Vocabulary(collection.tokenizer)
    planned = plan_files(request, collection, knows_bytes=vocabulary.knows_bytes)
    if collection.manifest:
        verify(collection.path, request.workers, verified)
        _require_new(request.out)  # check again, because the verification can take minutes
    with one_line_write_errors(request.out), atomic_folder(request.out) as folder:
        # For other formats, the suffix of the file determines the writer.
        open_format = partial(write_flat, header=lambda tokens: b"") if request.to == NANOGPT else None
        write = partial(_write_file, folder, collection, vocabulary, open_format)
        files = tuple(map_threads(write, planned, request.workers, written))
        if request.to != NANOGPT:
            _write_manifest(folder, _manifest_of(request, collection, files))
    return Conversion(collection.format, files)


#: The formats that training reads as they are, and how to map the tokens of one file.
_IN_PLACE: dict[str, Callable[[Path], TokenArray]] = {LLMC: map_llmc_file, NPY: map_npy_file}


def adopt_in_place(
    folder: Path,
    source_format: str = AUTO,
    split_of: Mapping[str, str] | None = None,
    workers: int | None = None,
    advance: Advance = no_progress,
) -> Manifest:
    """Write a manifest into a folder with shards of llm.c or build-nanogpt, so that training can read the shards.

    If the folder already has a manifest that names exactly the shards in the folder, return this manifest.

    Args:
        source_format: the argument ``format`` of ``open_collection``.
        split_of: the argument ``split_of`` of ``open_collection``.
        workers: the number of threads. None means one per core.
        advance: receives the number of bytes read since its last call.

    Raises:
        DataError: the folder is not writable, or it has no shards of llm.c or build-nanogpt. For a folder with a
            manifest: the manifest names other shards, or ``split_of`` is given.
    """
    if (folder / MANIFEST_NAME).exists():
        return _load_adopted(folder, split_of or {})
    if not folder.is_dir():
        raise DataError(f"--in-place: {folder} is not a folder")
    if not is_writable(folder):
        raise DataError(f"--in-place: cannot write {folder}; write a copy elsewhere with --to npy --out DIR")
    collection = open_collection(folder, source_format, split_of)
    format = collection.format
    if format not in _IN_PLACE:
        raise DataError(
            f"--in-place: the files of {folder} are in the format {format}; only those of "
            f"{' and '.join(_IN_PLACE)} can stay in place, convert the others with --to and --out"
        )
    files = [(name, path) for name, split in collection.splits.items() for path in split.tokens_of_file]
    describe = partial(_describe_shard, Vocabulary(collection.tokenizer), _IN_PLACE[format])
    shards = tuple(map_threads(describe, files, workers, advance))
    # A user may move the folder, so the manifest does not contain its path.
    options = {key: value for key, value in collection.source.options.items() if key != "input"}
    source = SourceRecord(format, options)
    manifest = Manifest(collection.tokenizer, source, {"format": format}, shards, made=_conversion_record(format))
    _write_manifest(folder, manifest)
    return manifest


def _load_adopted(folder: Path, split_of: Mapping[str, str]) -> Manifest:
    manifest = load_manifest(folder)
    named = {name for shard in manifest.shards for name in shard.files}
    suffixes = {Path(name).suffix for name in named}
    present = {path.name for path in folder.iterdir() if path.suffix in suffixes and not path.name.startswith(".")}
    again = f"delete {folder / MANIFEST_NAME} and repeat the command"
    if split_of:
        raise DataError(f"--split-of: the manifest of {folder} already names the splits; to change them, {again}")
    if added := sorted(present - named):
        raise DataError(f"{folder} has a {MANIFEST_NAME} that does not name {list_names(added)}; to add them, {again}")
    if missing := sorted(named - present):
        raise DataError(f"{folder} lacks {list_names(missing)}; copy them again, or to train without them, {again}")
    return manifest


def _require_new(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; name a folder")
    if os.path.ismount(out):
        raise DataError(f"--out {out} is a mount point; name a new folder in it")
    with one_line_write_errors(out):
        names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    require_writable(out, "--out")
    if names:
        raise DataError(f"--out {out} is not empty (it holds {names[0]}); name a new or empty folder")


def _write_file(
    folder: Path,
    collection: TokenCollection,
    vocabulary: Vocabulary,
    open_format: OpenFormat | None,
    planned: PlannedFile,
    advance: Advance,
) -> ShardRecord:
    stream = collection.splits[planned.split].stream
    writer = ShardWriter(folder, planned.name, planned.split, open_format)
    try:
        for start, length in read_ranges(planned.start, planned.stop):
            tokens = stream.read(start, length)
            contents = vocabulary.count(tokens, collection.path)
            writer.append(tokens, documents=contents.documents, utf8_bytes=contents.utf8_bytes)
            advance(tokens.nbytes)
        record = writer.close()
    except BaseException:
        writer.abort()
        raise
    original = planned.record
    if original is None:
        return record
    if original.mask_file is not None:
        mask_path = folder / mask_file_of(record.file)
        with one_line_write_errors(mask_path):
            shutil.copyfile(collection.path / original.mask_file, mask_path)
    # Copy the counts from the source, because bytes of text can be counted only for GPT-2's tokenizer.
    return replace(
        record,
        documents=original.documents,
        utf8_bytes=original.utf8_bytes,
        mask_sha256=original.mask_sha256,
    )


def _manifest_of(request: ConvertRequest, collection: TokenCollection, files: tuple[ShardRecord, ...]) -> Manifest:
    original = collection.manifest
    settings = {**(original.settings if original else {}), "format": request.to}
    if not keeps_shards(request, collection):
        settings["shard_tokens"] = request.shard_tokens or DEFAULT_SHARD_TOKENS
    made = {**(original.made or {} if original else {}), **_conversion_record(collection.format)}
    report = original.report if original else None
    return Manifest(collection.tokenizer, collection.source, settings, files, report, made)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST_NAME
    with one_line_write_errors(path):
        write_json_durably(path, manifest.to_json())


def _conversion_record(format: str) -> dict[str, Any]:
    return {"converted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "converted_from": format}


def _describe_shard(
    vocabulary: Vocabulary, map_tokens: Callable[[Path], TokenArray], file: tuple[str, Path], advance: Advance
) -> ShardRecord:
    split, path = file
    tokens = map_tokens(path)
    with one_line_read_errors(path):
        sha256 = sha256_of_file(path, advance)
    contents = vocabulary.count(tokens, path, advance)
    return ShardRecord(path.name, split, tokens.size, contents.documents, contents.utf8_bytes, sha256)

"""Our own folders: a manifest and its shards."""

from __future__ import annotations

from pathlib import Path

from data_tools.formats.collection import Split, TokenCollection, TokenFile
from data_tools.shards import TokenStream, load_manifest

NATIVE = "native"


def open_native(folder: Path) -> TokenCollection:
    """A folder with a manifest.

    Raises:
        DataError: the manifest is unusable, or a shard is missing, short or long.
    """
    manifest = load_manifest(folder)
    splits = {}
    for split in manifest.splits():
        stream = TokenStream(folder, manifest, split)
        shards = manifest.shards_of(split)
        sizes = [(folder / shard.file).stat().st_size for shard in shards]
        files = tuple(
            TokenFile(folder / shard.file, size, shard.tokens) for shard, size in zip(shards, sizes, strict=True)
        )
        splits[split] = Split(stream, files)
    return TokenCollection(folder, NATIVE, manifest.tokenizer, manifest.source, splits, manifest)

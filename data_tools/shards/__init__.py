"""Token shards: what stage 1 writes and every other stage reads.

A folder holds ``manifest.json`` and shards. A shard is one-dimensional uint16 tokens in a ``.npy`` file or an
Arrow IPC stream. The shards of a split, concatenated in the manifest's order, are one stream of tokens.
"""

from data_tools.shards.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TRAIN_SPLIT,
    VAL_SPLIT,
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    load_manifest,
)
from data_tools.shards.reader import TokenStream, expect_unchanged, map_shard, open_split, verify
from data_tools.shards.writer import SHARD_FORMATS, ShardWriter

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "SHARD_FORMATS",
    "TRAIN_SPLIT",
    "VAL_SPLIT",
    "Manifest",
    "ShardRecord",
    "ShardWriter",
    "SourceRecord",
    "TokenStream",
    "TokenizerRecord",
    "expect_unchanged",
    "load_manifest",
    "map_shard",
    "open_split",
    "verify",
]

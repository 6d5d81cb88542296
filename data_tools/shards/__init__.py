"""Token shards, which stage 1 writes and every other stage reads.

A folder holds ``manifest.json`` and shards. A shard is one-dimensional uint16 tokens in a ``.npy`` file, an Arrow IPC
stream, or a ``.bin`` with llm.c's header. The shards of a split, concatenated in the manifest's order, are one stream
of tokens. A shard may have a mask file beside it: one uint8 per token, 1 where the token is scored as a target.
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
    parse_manifest,
)
from data_tools.shards.mapping import map_mask, map_shard
from data_tools.shards.reader import TokenStream, open_split
from data_tools.shards.verification import require_unchanged, verify
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
    "require_unchanged",
    "load_manifest",
    "map_mask",
    "map_shard",
    "open_split",
    "parse_manifest",
    "verify",
]

"""Token shards, which stage 1 writes and every other stage reads.

A folder contains ``manifest.json`` and shards. A shard contains one-dimensional uint16 tokens in a ``.npy`` file, an
Arrow IPC stream, or a ``.bin`` file with llm.c's header. The shards of a split, concatenated in the manifest's order,
are one stream of tokens. A shard may have a mask file with one uint8 per token, which is 1 if the token is scored as a
target.
"""

from data_tools.shards.manifest import load_manifest
from data_tools.shards.reader import open_split
from data_tools.shards.verification import verify

__all__ = ["load_manifest", "open_split", "verify"]  # for scripts of users, see docs/data.md

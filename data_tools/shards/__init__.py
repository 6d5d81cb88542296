"""Read and write token shards, which stage 1 produces and the other stages use.

A folder contains ``manifest.json`` and shards. A shard is a file with a one-dimensional array of uint16 tokens: a
``.npy`` file, an Arrow IPC stream, or a ``.bin`` file with llm.c's header. The shards of a split form one stream of
tokens, in the order of the manifest.

A token is scored if its prediction counts in the loss. A shard may have a mask file with one uint8 per token: 1 if the
token is scored, otherwise 0.
"""

from data_tools.shards.manifest import load_manifest
from data_tools.shards.reader import open_split
from data_tools.shards.verification import verify

__all__ = ["load_manifest", "open_split", "verify"]  # for scripts of users, see docs/data.md

"""Read and write shards of llm.c and modded-nanogpt.

A shard consists of a header and uint16 tokens. The header is 256 int32: a magic number, the version, the number of
tokens, and zeros. llm.c defines the format in ``dev/data/data_common.py``.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from data_tools.arrays import TokenArray

LLMC_SUFFIX = ".bin"
MAGIC = 20240520
VERSION = 1
# llm.c's files with other contents.
_OTHER_MAGICS = {
    20240326: "weights of a model",
    20240327: "values for a test of a model",
    20240522: "an evaluation task",
    20240801: "tokens of 32 bits, as for Llama 3",
}
HEADER_BYTES = 256 * 4
MAX_TOKENS = (1 << 31) - 1  # the number of tokens is stored as an int32
_TOKEN_BYTES = 2


def is_llmc(path: Path) -> bool:
    """Return whether a file begins like a file of llm.c. Raise OSError if the file cannot be read."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little") in (MAGIC, *_OTHER_MAGICS)


def llmc_tokens(content: pa.Buffer) -> TokenArray:
    """Return the tokens in the content of a shard, without a copy.

    Raises:
        ValueError: the header is wrong, or does not match the size of the content.
    """
    if content.size < HEADER_BYTES:
        raise ValueError(f"it ends after {content.size} bytes, within its header")
    magic, version, tokens = np.frombuffer(content, dtype="<i4", count=3).tolist()
    if magic in _OTHER_MAGICS:
        raise ValueError(f"it contains {_OTHER_MAGICS[magic]} (magic {magic}); this command reads uint16 tokens")
    if magic != MAGIC:
        raise ValueError(f"its magic is {magic}, that of llm.c's uint16 tokens is {MAGIC}")
    if version != VERSION:
        raise ValueError(f"its version is {version}, it must be {VERSION}")
    if content.size != HEADER_BYTES + tokens * _TOKEN_BYTES:
        found = (content.size - HEADER_BYTES) / _TOKEN_BYTES
        raise ValueError(f"its header says {tokens} tokens, its size says {found:.15g}")
    return np.frombuffer(content, dtype="<u2", count=tokens, offset=HEADER_BYTES)


def llmc_header(tokens: int) -> bytes:
    """Return the header for a shard with the given number of tokens.

    Raises:
        ValueError: the number is too large for the header.
    """
    if tokens > MAX_TOKENS:
        raise ValueError(f"a shard of llm.c holds at most {MAX_TOKENS} tokens, not {tokens}")
    fields = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    fields[:3] = MAGIC, VERSION, tokens
    return fields.tobytes()

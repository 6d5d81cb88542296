"""Dividing documents between training and validation, the same way every time."""

from __future__ import annotations

import hashlib
import struct

from data_tools.shards import TRAIN_SPLIT, VAL_SPLIT


def draw_split(fingerprint: bytes, *, val_fraction: float, seed: int) -> str:
    """The split of a document: a pure function of its contents.

    Equal documents are therefore never on both sides, and where a document stands does not matter.

    Args:
        fingerprint: of the document, see ``data_tools.encoding.documents.fingerprint_of``.
    """
    digest = hashlib.blake2b(fingerprint, digest_size=8, key=struct.pack("<Q", seed)).digest()
    return VAL_SPLIT if int.from_bytes(digest, "little") < val_fraction * 2**64 else TRAIN_SPLIT

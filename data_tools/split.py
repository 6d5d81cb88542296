"""Dividing documents between training and validation, the same way every time."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator

from data_tools.shards import TRAIN_SPLIT, VAL_SPLIT


def draw_split(index: int, *, val_fraction: float, seed: int) -> str:
    """The split of document ``index``: a pure function, the same on every machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return VAL_SPLIT if int.from_bytes(digest, "little") < val_fraction * 2**64 else TRAIN_SPLIT


def assign_splits(documents: Iterable[str], *, val_fraction: float, seed: int) -> Iterator[tuple[str, str]]:
    """Pair each document with its split, in one pass that holds one document back.

    Small corpora keep both splits: if all documents but the last were drawn into one split, the last goes into
    the other. A single document is for training, and so is everything when ``val_fraction`` is 0.

    Yields:
        (split, document) in the order of the documents.
    """
    held: tuple[str, str] | None = None
    drawn: set[str] = set()
    for index, document in enumerate(documents):
        if held is not None:
            drawn.add(held[0])
            yield held
        held = draw_split(index, val_fraction=val_fraction, seed=seed), document
    if held is None:
        return
    split, document = held
    if not drawn:
        split = TRAIN_SPLIT
    elif len(drawn) == 1 and val_fraction > 0:
        split = VAL_SPLIT if TRAIN_SPLIT in drawn else TRAIN_SPLIT
    yield split, document

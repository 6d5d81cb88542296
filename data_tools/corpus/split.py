"""Assign documents to the training split or the validation split."""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from data_tools.encoding.documents import Document, fingerprint_of, utf8_of
from data_tools.shards.manifest import TRAIN_SPLIT, VAL_SPLIT

# The ends of a paragraph, a line and a word.
_ENDS = ("\n\n", "\n", " ")
_OTHER_SPLIT = {TRAIN_SPLIT: VAL_SPLIT, VAL_SPLIT: TRAIN_SPLIT}


class AssignedDocument(NamedTuple):
    """A document with its text in UTF-8 and its split.

    ``is_divided`` is True for the pieces of a text that was divided between the splits.
    """

    document: Document
    utf8: bytes
    split: str
    is_divided: bool = False

    @property
    def fingerprint(self) -> bytes:
        """Return the fingerprint (a hash) of the document. Each call computes it."""
        return fingerprint_of(self.document, self.utf8)


def draw_split(fingerprint: bytes, *, val_fraction: float, seed: int) -> str:
    """Choose a split for a document. Equal documents get the same split.

    ``val_fraction`` is the probability of the validation split.
    """
    digest = hashlib.blake2b(fingerprint, digest_size=8, key=struct.pack("<Q", seed)).digest()
    return VAL_SPLIT if int.from_bytes(digest, "little") < val_fraction * 2**64 else TRAIN_SPLIT


def assign_splits(
    documents: Iterable[Document], *, val_fraction: float, seed: int, fill_both: bool
) -> Iterator[AssignedDocument]:
    """Choose a split for each document with ``draw_split``. No document may be empty.

    If ``fill_both`` is True, ``fill_both_splits`` moves documents to a split that would otherwise be empty.
    ``documents`` must then be the whole corpus.
    """

    def assign(document: Document) -> AssignedDocument:
        utf8 = utf8_of(document)
        split = TRAIN_SPLIT  # without a validation split, the time of a hash is saved
        if val_fraction:
            split = draw_split(fingerprint_of(document, utf8), val_fraction=val_fraction, seed=seed)
        return AssignedDocument(document, utf8, split)

    assigned = map(assign, documents)
    return fill_both_splits(assigned, val_fraction) if fill_both and val_fraction > 0 else assigned


def fill_both_splits(assigned: Iterator[AssignedDocument], val_fraction: float) -> Iterator[AssignedDocument]:
    """Yield the documents of a corpus, each with its split.

    If all documents have the same split, it is changed as follows:

    - Different documents: find the last document that is not a copy of an earlier one. Move this document and its
      copies to the other split.
    - A single text: divide the text with ``divide_text``.
    - A single ``Dialogue``, or only copies of one document: use everything for training.
    """
    held: list[AssignedDocument] = []  # the last document that repeats no earlier one, and all documents after it
    seen: set[bytes] = set()
    for following in assigned:
        if held and following.split != held[0].split:
            yield from (*held, following)
            yield from assigned
            return
        fingerprint = following.fingerprint
        if fingerprint not in seen:
            yield from held
            held = []
        seen.add(fingerprint)
        held.append(following)
    if len(seen) == len(held) == 1 and isinstance(text := held[0].document, str):
        yield from divide_text(text, val_fraction)
        return
    last_new = held[0].fingerprint if held else b""
    for document in held:
        is_last_new = document.fingerprint == last_new
        split = TRAIN_SPLIT if len(seen) == 1 else _OTHER_SPLIT[document.split] if is_last_new else document.split
        yield document._replace(split=split)


def divide_text(text: str, val_fraction: float) -> Iterator[AssignedDocument]:
    """Divide a text into two pieces. Yield the first piece for training and the second piece for validation.

    The second piece has at least ``val_fraction`` and at most about ``2 * val_fraction`` of the characters. The cut is
    after a paragraph if possible, otherwise after a line or a word. A text without such a place is used only for
    training.
    """
    ideal = int(len(text) * (1 - val_fraction))
    earliest = max(1, 2 * ideal - len(text))  # A cut here gives validation twice the fraction.
    places = (text.rfind(end, earliest, ideal) + len(end) for end in _ENDS if end in text[earliest:ideal])
    cut = next(places, None)
    pieces = [(text, TRAIN_SPLIT)] if cut is None else [(text[:cut], TRAIN_SPLIT), (text[cut:], VAL_SPLIT)]
    for piece, split in pieces:
        yield AssignedDocument(piece, utf8_of(piece), split, is_divided=cut is not None)

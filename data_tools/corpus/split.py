"""Divide documents between training and validation. Equal seeds give equal divisions."""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from data_tools.encoding.documents import Document, fingerprint_of, utf8_of
from data_tools.shards.manifest import TRAIN_SPLIT, VAL_SPLIT

# The ends of a paragraph, of a line and of a word.
_ENDS = ("\n\n", "\n", " ")
_OTHER_SPLIT = {TRAIN_SPLIT: VAL_SPLIT, VAL_SPLIT: TRAIN_SPLIT}


@dataclass(frozen=True)
class AssignedDocument:
    """A document, its text in UTF-8, its fingerprint and its split.

    ``is_part`` says whether the document is a part of the only document of the corpus.
    """

    document: Document
    utf8: bytes
    fingerprint: bytes
    split: str
    is_part: bool = False


def draw_split(fingerprint: bytes, *, val_fraction: float, seed: int) -> str:
    """Return the split of a document. The split depends on the fingerprint, so equal documents are in the same split.

    ``val_fraction`` is the expected fraction of documents in the validation split. Another seed divides differently.
    """
    digest = hashlib.blake2b(fingerprint, digest_size=8, key=struct.pack("<Q", seed)).digest()
    return VAL_SPLIT if int.from_bytes(digest, "little") < val_fraction * 2**64 else TRAIN_SPLIT


def assign_splits(
    documents: Iterable[Document], *, val_fraction: float, seed: int, fill_both: bool
) -> Iterator[AssignedDocument]:
    """Yield each document with the split that ``draw_split`` returns, in order. No document may be empty.

    Set ``fill_both`` if the documents are the whole corpus; ``fill_both_splits`` then fills an empty split.
    """

    def assign(document: Document) -> AssignedDocument:
        utf8 = utf8_of(document)
        fingerprint = fingerprint_of(document, utf8)
        split = draw_split(fingerprint, val_fraction=val_fraction, seed=seed)
        return AssignedDocument(document, utf8, fingerprint, split)

    assigned = map(assign, documents)
    return fill_both_splits(assigned, val_fraction) if fill_both and val_fraction > 0 else assigned


def fill_both_splits(assigned: Iterator[AssignedDocument], val_fraction: float) -> Iterator[AssignedDocument]:
    """Move one document to the other split if all documents are in the same split, so that no split is empty.

    The function moves the last document that does not repeat an earlier document, and all documents that are equal to
    this document. If all documents are equal, the function puts all of them into the training split. If there is only
    one document and it is a text, ``divide_text`` divides it.
    """
    held: list[AssignedDocument] = []  # the last document that repeats no earlier document, and all later documents
    seen: set[bytes] = set()
    for following in assigned:
        if held and following.split != held[0].split:
            yield from (*held, following)
            yield from assigned
            return
        if following.fingerprint not in seen:
            yield from held
            held = []
        seen.add(following.fingerprint)
        held.append(following)
    if len(seen) == len(held) == 1 and isinstance(text := held[0].document, str):
        yield from divide_text(text, val_fraction)
        return
    for document in held:
        is_last_new = document.fingerprint == held[0].fingerprint
        split = TRAIN_SPLIT if len(seen) == 1 else _OTHER_SPLIT[document.split] if is_last_new else document.split
        yield replace(document, split=split)


def divide_text(text: str, val_fraction: float) -> Iterator[AssignedDocument]:
    """Yield the beginning of a text for training and its end, about ``val_fraction`` of it, for validation.

    The text is cut after the end of a paragraph, of a line or of a word, in this order of preference. A text without
    such a place near the fraction is not divided and used for training.
    """
    ideal = int(len(text) * (1 - val_fraction))
    earliest = max(1, 2 * ideal - len(text))  # with twice the fraction
    places = (text.rfind(end, earliest, ideal) + len(end) for end in _ENDS if end in text[earliest:ideal])
    cut = next(places, None)
    pieces = [(text, TRAIN_SPLIT)] if cut is None else [(text[:cut], TRAIN_SPLIT), (text[cut:], VAL_SPLIT)]
    for piece, split in pieces:
        utf8 = utf8_of(piece)
        yield AssignedDocument(piece, utf8, fingerprint_of(piece, utf8), split, is_part=cut is not None)

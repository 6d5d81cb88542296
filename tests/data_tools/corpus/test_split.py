"""Check that documents are divided by their contents, the same way every time."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.corpus.split import AssignedDocument, divide_text, draw_split, fill_both_splits

FINGERPRINTS = st.binary(min_size=16, max_size=16)
SEEDS = st.integers(0, 2**64 - 1)


def fingerprint(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()[:16]


def splits(count: int, val_fraction: float, seed: int = 0) -> list[str]:
    return [draw_split(fingerprint(number), val_fraction=val_fraction, seed=seed) for number in range(count)]


def test_the_draw_never_changes() -> None:
    validation = [number for number, split in enumerate(splits(1000, 0.01)) if split == "val"]
    assert validation[:12] == [8, 71, 167, 211, 242, 391, 454, 463, 547, 563, 593, 609]


@pytest.mark.parametrize("val_fraction", [0.01, 0.1, 0.5])
def test_the_share_of_validation_is_near_what_was_asked(val_fraction: float) -> None:
    share = splits(20_000, val_fraction).count("val") / 20_000
    assert share == pytest.approx(val_fraction, abs=4 * (val_fraction * (1 - val_fraction) / 20_000) ** 0.5)


def test_the_seed_changes_the_draw() -> None:
    assert splits(1000, 0.1, seed=1) == splits(1000, 0.1, seed=1)
    assert splits(1000, 0.1, seed=1) != splits(1000, 0.1, seed=2)
    assert splits(1000, 0.5, seed=2**64 - 1).count("val") == pytest.approx(500, abs=64)


@given(fingerprint=FINGERPRINTS, seed=SEEDS, fractions=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2))
def test_a_larger_fraction_keeps_what_was_for_validation(
    fingerprint: bytes, seed: int, fractions: tuple[float, float]
) -> None:
    smaller, larger = sorted(fractions)
    if draw_split(fingerprint, val_fraction=smaller, seed=seed) == "val":
        assert draw_split(fingerprint, val_fraction=larger, seed=seed) == "val"


@given(fingerprint=FINGERPRINTS, seed=SEEDS)
def test_no_fraction_no_validation(fingerprint: bytes, seed: int) -> None:
    assert draw_split(fingerprint, val_fraction=0.0, seed=seed) == "train"


def assigned(drawn: list[tuple[int, bool]]) -> list[AssignedDocument]:
    """Return documents by number with the split that the first draw of each number gives."""
    draws = dict(reversed(drawn))
    return [AssignedDocument(str(number), b"%d" % number, "val" if draws[number] else "train") for number, _ in drawn]


@given(drawn=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12))
def test_both_splits_get_a_document_and_equal_ones_stay_together(drawn: list[tuple[int, bool]]) -> None:
    before = assigned(drawn)
    after = list(fill_both_splits(iter(before), 0.01))
    assert [one.document for one in after] == [one.document for one in before]
    sides = {one.fingerprint: one.split for one in after}
    assert all(one.split == sides[one.fingerprint] for one in after), "equal documents are in one split"
    if len(sides) == 1:
        assert set(sides.values()) == {"train"}
    elif sides:
        assert set(sides.values()) == {"train", "val"}
    moved = {one.fingerprint for one, now in zip(before, after, strict=True) if one.split != now.split}
    assert len(moved) <= 1
    if len({one.split for one in before}) == 2:
        assert not moved, "no document had to move"


def test_documents_are_held_back_only_until_both_splits_have_one() -> None:
    endless = itertools.chain(assigned([(0, False), (1, True)]), itertools.repeat(assigned([(0, False)])[0]))
    taken = itertools.count()
    counted = (one for one, _ in zip(endless, taken, strict=False))
    assert [one.document for one in itertools.islice(fill_both_splits(counted, 0.01), 100)] == ["0", "1", *["0"] * 98]
    assert next(taken) <= 101


@pytest.mark.parametrize(
    ("text", "val_fraction", "cut"),
    [
        ("a b\nc\n\nd\n\ne f\ng\n\nh", 0.3, "a b\nc\n\nd\n\n"),
        ("one line\n" * 100, 0.1, "one line\n" * 90),
        ("word " * 100, 0.1, "word " * 90),
        ("x" * 100, 0.1, None),
        ("one", 0.01, None),
        ("x", 0.99, None),
    ],
)
def test_a_text_is_cut_after_a_paragraph_a_line_or_a_word(text: str, val_fraction: float, cut: str | None) -> None:
    pieces = list(divide_text(text, val_fraction))
    assert "".join(str(piece.document) for piece in pieces) == text
    assert [piece.split for piece in pieces] == (["train"] if cut is None else ["train", "val"])
    assert pieces[0].document == (text if cut is None else cut)
    assert all(piece.is_divided == (cut is not None) for piece in pieces)


@given(words=st.lists(st.sampled_from(["a", "bc", "\n", "\n\n", " "]), min_size=1), val_fraction=st.floats(0.01, 0.99))
def test_validation_gets_at_most_twice_its_fraction_of_a_text(words: list[str], val_fraction: float) -> None:
    text = "".join(words)
    pieces = list(divide_text(text, val_fraction))
    assert "".join(str(piece.document) for piece in pieces) == text
    assert all(piece.document for piece in pieces)
    if len(pieces) == 2:
        assert len(str(pieces[1].document)) <= 2 * val_fraction * len(text) + 2

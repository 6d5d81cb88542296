"""Documents are divided the same way every time, and both splits exist where they can."""

from __future__ import annotations

import pytest

from data_tools.split import assign_splits, draw_split


def splits(count: int, val_fraction: float, seed: int = 0) -> list[str]:
    documents = [str(index) for index in range(count)]
    pairs = list(assign_splits(documents, val_fraction=val_fraction, seed=seed))
    assert [document for _, document in pairs] == documents
    return [split for split, _ in pairs]


def test_the_draw_is_fixed_for_ever() -> None:
    validation = [index for index in range(1000) if draw_split(index, val_fraction=0.01, seed=0) == "val"]
    assert validation == [71, 146, 496, 508, 935]


@pytest.mark.parametrize("val_fraction", [0.01, 0.1, 0.5])
def test_the_share_of_validation_is_near_what_was_asked(val_fraction: float) -> None:
    share = splits(20_000, val_fraction).count("val") / 20_000
    assert share == pytest.approx(val_fraction, abs=4 * (val_fraction * (1 - val_fraction) / 20_000) ** 0.5)


def test_the_seed_changes_the_draw() -> None:
    assert splits(1000, 0.1, seed=1) == splits(1000, 0.1, seed=1)
    assert splits(1000, 0.1, seed=1) != splits(1000, 0.1, seed=2)


def test_a_document_keeps_its_split_when_more_follow() -> None:
    assert splits(5000, 0.1)[:1000] == splits(1001, 0.1)[:1000]


def test_no_fraction_no_validation() -> None:
    assert set(splits(1000, 0.0)) == {"train"}


@pytest.mark.parametrize("val_fraction", [1e-12, 0.01, 0.999999999])
def test_two_documents_make_two_splits(val_fraction: float) -> None:
    for seed in range(20):
        assert sorted(splits(2, val_fraction, seed)) == ["train", "val"]


@pytest.mark.parametrize("val_fraction", [0.01, 0.999999999])
def test_a_single_document_is_for_training(val_fraction: float) -> None:
    assert splits(1, val_fraction) == ["train"]


def test_no_documents_no_splits() -> None:
    assert splits(0, 0.5) == []

"""Shared beginnings are computed once, and batches stay within their tokens."""

from __future__ import annotations

from pipeline.evaluation.packing import Request, Tree, build_trees, make_batch, pack
from tests.pipeline.evaluation.conftest import CONTEXT


def test_a_shared_beginning_is_computed_once() -> None:
    context = tuple(range(20))
    group = [Request(context, (50, 51, 52)), Request(context, (50, 51, 53)), Request(context, (60,))]
    (tree,) = build_trees([[0, 1, 2]], group, CONTEXT, None)
    assert tree.tokens == [*context, 50, 51]  # the last token of each request is only a target
    assert len(tree.pairs) == 5  # two requests share the scores of 50 and 51
    assert tree.is_chain
    forked = [Request(context, (50, 51, 52)), Request(context, (60, 61, 62))]
    (tree,) = build_trees([[0, 1]], forked, CONTEXT, None)
    assert not tree.is_chain
    assert tree.positions == [*range(20), 20, 21, 20, 21]


def test_requests_with_little_in_common_get_separate_rows() -> None:
    apart = [Request((1, *range(10, 30)), (5, 6)), Request((1, *range(40, 60)), (5, 6))]
    assert len(build_trees([[0, 1]], apart, CONTEXT, None)) == 2


def test_batches_stay_within_their_tokens_and_hold_rows_of_similar_length() -> None:
    trees = []
    for length in (5, 30, 12, 31, 6, 100, 13):
        tree = Tree()
        tree.add(0, Request(tuple(range(length)), (1,)), 1000, None)
        trees.append(tree)
    batches = pack(trees, 64)
    assert [[len(tree.tokens) for tree in batch] for batch in batches] == [[100], [31, 30], [13, 12], [6, 5]]
    inputs, _ = make_batch(batches[1])
    assert inputs.tokens.shape == (2, 31)
    assert [len(batch) for batch in pack(trees, 256)] == [1, 2, 4], "a small batch may have more padding"

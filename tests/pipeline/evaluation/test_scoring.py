"""Scores do not depend on batch sizes, shared beginnings, the number of ranks, or other requests."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config.schema import ModelConfig
from pipeline.distributed.world import World
from pipeline.errors import TrainingError
from pipeline.evaluation.packing import Request
from pipeline.evaluation.scoring import Score, Scorer
from pipeline.model.gpt2 import GPT2, ScoringBatch
from tests.pipeline.conftest import random_tokens, randomised_model
from tests.pipeline.evaluation.conftest import ALONE, CONTEXT, plain_score, scorer_of


def make_groups() -> list[list[Request]]:
    """Return groups that share contexts, choices that begin alike, duplicates, and requests that are too long."""
    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(50256), k=count))

    groups = []
    for context_tokens in (1, 5, 17, 30, CONTEXT, CONTEXT + 9):
        context, start = tokens(context_tokens), tokens(3)
        groups.append([Request(context, (*start, *tokens(n))) for n in (0, 2, 5)])
        groups.append([Request(context, tokens(n)) for n in (1, 4)])
    groups.append([Request(tokens(4), tokens(3)), Request(tokens(9), tokens(2))])
    groups.append([groups[0][0], groups[2][1], groups[2][1]])
    return groups


GROUPS = make_groups()


@pytest.fixture(scope="module")
def plain(text_model: GPT2) -> list[list[tuple[float, bool]]]:
    return [[plain_score(text_model, request) for request in group] for group in GROUPS]


def assert_same(found: Sequence[Sequence[Score]], expected: Sequence[Sequence[tuple[float, bool]]]) -> None:
    assert [len(group) for group in found] == [len(group) for group in expected]
    for score, (log_likelihood, is_greedy) in zip(sum(found, []), sum(expected, []), strict=True):  # type: ignore[arg-type]
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=2e-5)
        assert score.is_greedy == is_greedy


@pytest.mark.parametrize("batch_tokens", [1, 64, 300, 10_000])
def test_any_batch_size_gives_the_scores_of_a_plain_loop(
    text_model: GPT2, plain: list[list[tuple[float, bool]]], batch_tokens: int
) -> None:
    assert_same(scorer_of(text_model, batch_tokens).score(GROUPS, "test"), plain)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_work_and_run_equally_many_forward_passes(
    text_model: GPT2, plain: list[list[tuple[float, bool]]], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of all ranks together give the scores of one process."""
    sums: list[torch.Tensor] = []
    forwards: list[int] = []

    def collect(_world: World, values: torch.Tensor) -> torch.Tensor:
        sums.append(values)
        return torch.stack(sums).sum(0)

    monkeypatch.setattr(World, "sum", collect)
    for rank in range(size):
        scorer = scorer_of(text_model, 100, World(rank, size, rank, ALONE.device))
        forwards.append(0)
        scorer.compute.register_forward_pre_hook(lambda *_: forwards.append(forwards.pop() + 1))
        found = scorer.score(GROUPS, "test")
    assert_same(found, plain)
    assert len(set(forwards)) == 1
    assert forwards[0] > 2


def test_scoring_does_not_use_cudnn(text_model: GPT2) -> None:
    """The kernel of cuDNN needs time for each new shape, and batches of requests have many shapes."""
    used: list[bool] = []
    scorer = scorer_of(text_model, 64)
    hook = text_model.h[0].register_forward_pre_hook(lambda *_: used.append(torch.backends.cuda.cudnn_sdp_enabled()))
    with hook, sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
        scorer.score(GROUPS, "test")
    assert used and not any(used)


def test_a_continuation_that_the_model_would_generate_is_greedy(text_model: GPT2, scorer: Scorer) -> None:
    tokens = [1, 2, 3]
    with torch.no_grad():
        for _ in range(3):
            tokens.append(int(text_model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    other = (tokens[-1] + 1) % 50257
    ((yes, no),) = scorer.score(
        [[Request((1, 2, 3), tuple(tokens[3:])), Request((1, 2, 3), (*tokens[3:5], other))]], ""
    )
    assert yes.is_greedy
    assert not no.is_greedy


def test_positions_restart_in_trees() -> None:
    sizes = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 12,
        "context_length": CONTEXT,
        "vocab_size": 89,
        "reset_positions_at": 88,
    }
    model = randomised_model(ModelConfig.model_validate(sizes)).eval()
    context = (3, 4, 5, 88, 6, 7)
    group = [Request(context, (8, 9)), Request(context, (10, 88, 11, 12))]
    assert_same(scorer_of(model).score([group], ""), [[plain_score(model, request) for request in group]])


def test_weights_that_are_not_finite_are_an_error(text_model: GPT2) -> None:
    broken = randomised_model(text_model.config).eval()
    with torch.no_grad():
        broken.ln_f.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="mytask: log-likelihoods are not finite"):
        scorer_of(broken).score([[Request((1,), (2,))]], "mytask")


def test_scored_outputs_are_those_of_all_logits(text_model: GPT2) -> None:
    """There are more outputs than are computed at a time."""
    tokens = random_tokens(5, CONTEXT, vocab_size=50257)
    outputs, targets = torch.arange(5 * CONTEXT), random_tokens(5 * CONTEXT, vocab_size=50257, seed=1)
    with torch.no_grad():
        log_probabilities = text_model.logits(tokens).flatten(0, 1).log_softmax(1)
        targets[7] = log_probabilities[7].argmax()
        found = text_model.score(ScoringBatch(tokens, targets, outputs))
    torch.testing.assert_close(found[0], log_probabilities.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(found[1] == 0, log_probabilities.argmax(1) == targets)
    assert found[1][7] == 0


@pytest.mark.gpu
def test_a_gpu_gives_the_scores_of_a_cpu(
    text_model: GPT2, plain: list[list[tuple[float, bool]]], gpu: torch.device
) -> None:
    copied = copy.deepcopy(text_model).to(gpu)
    found = scorer_of(copied, 300, World(0, 1, 0, gpu)).score(GROUPS, "test")
    for score, (log_likelihood, is_greedy) in zip(sum(found, []), sum(plain, []), strict=True):
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
        assert score.is_greedy == is_greedy

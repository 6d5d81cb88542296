"""Text from a model: what is drawn, from what, and when it ends."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pipeline.generation import generate
from pipeline.model import GPT2
from tests.pipeline.conftest import restless_model, tiny_model_config

PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def model() -> GPT2:
    return restless_model(tiny_model_config()).eval()


def likeliest(model: GPT2, tokens: list[int]) -> int:
    with torch.no_grad():
        return int(model(torch.tensor([tokens]))[0, -1].argmax())


def test_without_temperature_each_token_is_the_likeliest(model: GPT2) -> None:
    text = list(PROMPT)
    for token in generate(model, PROMPT, 6, temperature=0):
        assert token == likeliest(model, text)
        text.append(token)
    assert len(text) == 9


def test_the_one_likeliest_is_greedy(model: GPT2) -> None:
    greedy = list(generate(model, PROMPT, 20, temperature=0))
    assert list(generate(model, PROMPT, 20, top_k=1, seed=5)) == greedy
    assert len(greedy) == 20


def test_one_seed_one_text(model: GPT2) -> None:
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(texts))  # the global stream has no part in it
        texts.append(list(generate(model, PROMPT, 20, seed=seed)))
    assert texts[0] == texts[1] != texts[2]


def test_it_stops_before_the_end_of_text(model: GPT2) -> None:
    endless = list(generate(model, PROMPT, 12, seed=3))
    end = endless[7]
    assert list(generate(model, PROMPT, 12, seed=3, end_of_text=end)) == endless[: endless.index(end)]


def test_it_goes_on_beyond_the_context(model: GPT2) -> None:
    """With 12 positions, what the model sees are the last 12 tokens."""
    prompt = [int(i * 7 % 89) for i in range(40)]
    text = list(prompt)
    for token in generate(model, prompt, 10, temperature=0):
        assert token == likeliest(model, text[-12:])
        text.append(token)
    assert len(text) == 50


def draws(model: GPT2, count: int, **options: float) -> Counter[int]:
    return Counter(next(generate(model, PROMPT, 1, seed=seed, **options)) for seed in range(count))  # type: ignore


def test_draws_follow_the_model_and_the_temperature(model: GPT2) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]))[0, -1].double()
    for temperature in (1.0, 2.0):
        expected = torch.softmax(logits / temperature, dim=0)
        token = int(expected.argmax())
        share = draws(model, 800, temperature=temperature)[token] / 800
        deviation = (expected[token] * (1 - expected[token]) / 800).sqrt().item()
        assert share == pytest.approx(expected[token].item(), abs=4 * deviation)


def test_only_the_k_likeliest_are_drawn(model: GPT2) -> None:
    with torch.no_grad():
        best = model(torch.tensor([PROMPT]))[0, -1].topk(3).indices.tolist()
    assert set(draws(model, 200, top_k=3, temperature=50.0)) == set(best)


def test_k_beyond_the_vocabulary_is_all_of_it(model: GPT2) -> None:
    assert list(generate(model, PROMPT, 10, top_k=10**6, seed=1)) == list(generate(model, PROMPT, 10, seed=1))


def test_no_gradients_are_kept(model: GPT2) -> None:
    list(generate(model, PROMPT, 2))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_positions_start_again_as_in_training() -> None:
    """A text that is written after another one is written with the positions that it was learned with."""
    model = restless_model(tiny_model_config(reset_positions_at=88)).eval()
    prompt = [3, 1, 88, 4]
    written = list(generate(model, prompt, 6, temperature=0))
    for length in range(6):
        assert written[length] == likeliest(model, [*prompt, *written[:length]])
    plain = restless_model(tiny_model_config()).eval()
    assert written != list(generate(plain, prompt, 6, temperature=0))

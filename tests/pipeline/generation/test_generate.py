"""Generated tokens are drawn from the model's distribution, with a cache that does not change them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config.schema import SampleConfig
from pipeline.errors import TrainingError
from pipeline.generation.generate import Decoder, draw, generate_batch, window_start
from pipeline.model.gpt2 import GPT2
from pipeline.model.packed_linear import InferenceLinear, pack_linear_layers
from tests.pipeline.conftest import VOCAB_SIZE, randomised_model, tiny_model_config
from tests.pipeline.generation.conftest import generate, sampling

PROMPT = [3, 1, 4]
PROBABILITIES = [0.1, 0.4, 0.05, 0.3, 0.15]


@pytest.fixture(scope="module")
def model() -> GPT2:
    return randomised_model(tiny_model_config()).eval()


def likeliest(model: GPT2, tokens: list[int]) -> int:
    with torch.no_grad():
        return int(model.logits(torch.tensor([tokens]))[0, -1].argmax())


def test_temperature_0_is_greedy(model: GPT2) -> None:
    text = list(PROMPT)
    for token in generate(model, PROMPT, 6, temperature=0):
        assert token == likeliest(model, text)
        text.append(token)
    assert len(text) == 9


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_one_line(temperature: float) -> None:
    logits = torch.tensor([1.0, math.nan])
    with pytest.raises(TrainingError, match="logits are not finite"):
        draw(logits, SampleConfig(temperature=temperature), torch.Generator())


def test_top_k_of_1_is_greedy(model: GPT2) -> None:
    greedy = list(generate(model, PROMPT, 20, temperature=0))
    assert list(generate(model, PROMPT, 20, top_k=1, seed=5)) == greedy
    assert len(greedy) == 20


def test_the_seed_decides_the_tokens(model: GPT2) -> None:
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(texts))  # the global random stream has no effect
        texts.append(list(generate(model, PROMPT, 20, seed=seed)))
    assert texts[0] == texts[1] != texts[2]


def test_generation_stops_before_end_of_text(model: GPT2) -> None:
    endless = list(generate(model, PROMPT, 12, seed=3))
    end = endless[7]
    assert list(generate(model, PROMPT, 12, seed=3, end_of_text=end)) == endless[: endless.index(end)]


def test_generation_does_not_use_cudnn(model: GPT2) -> None:
    """The kernel of cuDNN needs time for each new shape, and every token makes the text longer."""
    used: list[bool] = []
    hook = model.h[0].register_forward_pre_hook(lambda *_: used.append(torch.backends.cuda.cudnn_sdp_enabled()))
    with hook, sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
        list(generate(model, PROMPT, 3, temperature=0))
    assert used == [False] * 3


def test_generation_continues_beyond_the_context(model: GPT2) -> None:
    """With 12 positions the window starts at 6 from the 13th token on, at 12 from the 19th on, ..."""
    prompt = [int(i * 7 % 89) for i in range(40)]
    text = list(prompt)
    for token in generate(model, prompt, 30, temperature=0):
        assert token == likeliest(model, text[window_start(len(text), 12) :])
        text.append(token)
    assert len(text) == 70


def test_the_window_holds_at_least_half_a_context_and_moves_rarely() -> None:
    for context in (1, 2, 12, 13):
        starts = [window_start(length, context) for length in range(1, 80)]
        seen = [length - start for length, start in enumerate(starts, 1)]
        assert max(seen) == context
        assert min(seen[context - 1 :]) >= max(context // 2, 1)
        assert starts == sorted(starts)
        assert len(set(starts)) <= 1 + 80 // max(context // 2, 1)


def test_the_cache_does_not_change_the_logits(model: GPT2) -> None:
    """Cached logits of texts with different lengths, side by side, equal those of each text alone."""
    texts = [[5], [3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]]
    decoder = Decoder(model)
    decoder.start(len(texts), 40)
    for step in range(25):  # the windows of all three texts move meanwhile
        logits = decoder.next_token_logits(texts)
        for text, row in zip(texts, logits, strict=True):
            with torch.no_grad():
                alone = model.logits(torch.tensor([text[window_start(len(text), 12) :]]))[0, -1]
            torch.testing.assert_close(row, alone, atol=2e-5, rtol=1e-5)
        for text in texts:
            text.append((step * 31 + len(text)) % VOCAB_SIZE)


def test_in_bf16_the_cache_changes_the_logits_by_rounding() -> None:
    model = randomised_model(tiny_model_config()).eval().bfloat16()
    decoder = Decoder(model)
    decoder.start(2, 12)
    texts = [[3, 1, 4, 1, 5], [2, 7]]
    for token in range(5):
        logits = decoder.next_token_logits(texts)
        for text, row in zip(texts, logits, strict=True):
            with torch.no_grad():
                alone = model.logits(torch.tensor([text]))[0, -1].float()
            assert (row - alone).abs().max() <= 0.05 * alone.abs().max()
            text.append(token)


def test_texts_in_any_order_get_their_logits(model: GPT2) -> None:
    """The cache is used only if each text continues the stored one."""
    decoder = Decoder(model)
    decoder.start(1, 12)
    for text in ([3, 1, 4], [3, 1, 4, 1], [7, 1, 4, 1, 5], [7, 1, 4], [7, 1, 4, 2]):
        with torch.no_grad():
            alone = model.logits(torch.tensor([text]))[:, -1]
        torch.testing.assert_close(decoder.next_token_logits([text]), alone, atol=2e-5, rtol=1e-5)


def test_rows_equal_those_generated_alone(model: GPT2) -> None:
    prompts = [[3, 1, 4], [88], [9, 2, 6, 5, 3, 5, 8, 9]]
    together = batch_texts(model, prompts, sampling(20, temperature=0))
    assert together == [list(generate(model, prompt, 20, temperature=0)) for prompt in prompts]
    drawn = batch_texts(model, prompts, sampling(20))
    assert drawn[0] == list(generate(model, prompts[0], 20))
    assert drawn != together


def test_equal_prompts_get_different_completions(model: GPT2) -> None:
    first, second = batch_texts(model, [PROMPT, PROMPT], sampling(20))
    assert first != second


def test_each_row_stops_on_its_own(model: GPT2) -> None:
    prompts = [[3, 1, 4], [88], [9, 2, 6, 5]]
    endless = batch_texts(model, prompts, sampling(20, temperature=0))
    end = endless[1][4]
    expected = [text[: text.index(end)] if end in text else text for text in endless]
    assert batch_texts(model, prompts, sampling(20, temperature=0), ends={end}) == expected
    ended = batch_texts(model, prompts, sampling(20, temperature=0), stopped={0})
    assert ended == [endless[0][:1], *endless[1:]]


def batch_texts(model: GPT2, prompts: list[list[int]], sample: SampleConfig, **options: Any) -> list[Any]:
    texts: list[list[int]] = [[] for _ in prompts]
    for tokens in generate_batch(Decoder(model), prompts, sample, **options):
        for row, token in tokens.items():
            texts[row].append(token)
    return texts


def draws(model: GPT2, count: int, **options: float) -> Counter[int]:
    return Counter(next(generate(model, PROMPT, 1, seed=seed, **options)) for seed in range(count))  # type: ignore


def test_draws_follow_the_model_and_the_temperature(model: GPT2) -> None:
    with torch.no_grad():
        logits = model.logits(torch.tensor([PROMPT]))[0, -1].double()
    for temperature in (1.0, 2.0):
        expected = torch.softmax(logits / temperature, dim=0)
        token = int(expected.argmax())
        share = draws(model, 800, temperature=temperature)[token] / 800
        deviation = (expected[token] * (1 - expected[token]) / 800).sqrt().item()
        assert share == pytest.approx(expected[token].item(), abs=4 * deviation)


def test_only_the_top_k_are_drawn(model: GPT2) -> None:
    with torch.no_grad():
        best = model.logits(torch.tensor([PROMPT]))[0, -1].topk(3).indices.tolist()
    assert set(draws(model, 200, top_k=3, temperature=50.0)) == set(best)


def test_top_k_beyond_the_vocabulary_has_no_effect(model: GPT2) -> None:
    assert list(generate(model, PROMPT, 10, top_k=10**6, seed=1)) == list(generate(model, PROMPT, 10, seed=1))


def test_no_gradients_are_computed(model: GPT2) -> None:
    list(generate(model, PROMPT, 2))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_positions_restart_as_in_training() -> None:
    """A text after another one is generated with the positions that training used."""
    model = randomised_model(tiny_model_config(reset_positions_at=88)).eval()
    prompt = [3, 1, 88, 4]
    written = list(generate(model, prompt, 6, temperature=0))
    for length in range(6):
        assert written[length] == likeliest(model, [*prompt, *written[:length]])
    plain = randomised_model(tiny_model_config()).eval()
    assert written != list(generate(plain, prompt, 6, temperature=0))


def test_positions_restart_within_generated_tokens() -> None:
    """The other text has another length, and the token that restarts positions is among the new ones."""
    model = randomised_model(tiny_model_config(reset_positions_at=88)).eval()
    texts = [[3, 1, 4, 1, 5], [88, 7]]
    decoder = Decoder(model)
    decoder.start(2, 12)
    for token in (9, 88, 2, 6, 5):
        logits = decoder.next_token_logits(texts)
        for text, row in zip(texts, logits, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(row, model.logits(torch.tensor([text]))[0, -1], atol=2e-5, rtol=1e-5)
            text.append(token)


def drawn(**options: float | int) -> set[int]:
    """Return all tokens of many draws."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor(PROBABILITIES).log()
    return {draw(logits, sampling(**options), generator) for _ in range(400)}


def test_temperature_0_draws_the_likeliest() -> None:
    assert drawn(temperature=0) == {1}


def test_without_limits_all_are_drawn() -> None:
    assert drawn() == {0, 1, 2, 3, 4}


def test_top_k() -> None:
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=99) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.01, {1}), (0.39, {1}), (0.5, {1, 3}), (0.8, {1, 3, 4}), (1.0, None)]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, expected: set[int] | None) -> None:
    assert drawn(top_p=top_p) == (expected or {0, 1, 2, 3, 4})


def test_top_p_applies_after_top_k() -> None:
    """0.4 / (0.4 + 0.3) = 0.57."""
    assert drawn(top_k=2, top_p=0.55) == {1}
    assert drawn(top_k=2, top_p=0.6) == {1, 3}


def test_top_p_applies_after_the_temperature() -> None:
    assert drawn(temperature=0.1, top_p=0.9) == {1}


def test_the_global_random_stream_is_not_used() -> None:
    logits = torch.tensor(PROBABILITIES).log()
    state = torch.get_rng_state()
    first = [draw(logits, sampling(), torch.Generator().manual_seed(7)) for _ in range(3)]
    assert len(set(first)) == 1
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.gpu
def test_a_gpu_generates_what_a_cpu_generates(model: GPT2, gpu: torch.device) -> None:
    """Rows of different lengths, beyond the context; the layers for a CPU stay unused on a GPU."""
    copied = randomised_model(tiny_model_config()).eval().to(gpu)
    pack_linear_layers(copied, torch.float32, rows=3)
    assert not any(isinstance(module, InferenceLinear) for module in copied.modules())
    prompts = [PROMPT, [7], list(range(30))]
    decoders = Decoder(model), Decoder(copied)
    for options in ({"temperature": 0}, {"temperature": 0.8, "top_k": 5}):
        rows = [list(generate_batch(each, prompts, sampling(20, **options), seed=3)) for each in decoders]
        assert rows[0] == rows[1]
    logits = [decoder.next_token_logits(prompts) for decoder in decoders]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)

"""Text from a model: token by token, several texts side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.generation.sampling import Sampling, draw
from pipeline.model.gpt2 import GPT2
from pipeline.model.key_value_cache import KeyValueCache
from pipeline.seeds import derive_seed

PADDING = 0  # any id will do: nothing looks at it


def generate(
    model: GPT2,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Continue a prompt, one token id at a time; see ``generate_batch`` and ``Sampling``."""
    sampling = Sampling(temperature, top_k, top_p)
    for tokens in generate_batch(model, [prompt], max_new_tokens, sampling, seed=seed, end_of_text=end_of_text):
        yield tokens[0]


def generate_batch(
    model: GPT2,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    end_of_text: int | None = None,
    is_last: Callable[[int, int], bool] = lambda row, token: False,
) -> Iterator[dict[int, int]]:
    """Continue several prompts together, one token each at a time.

    A row's text does not depend on the others, but for rounding: each draws from a stream of its own.

    Args:
        model: in evaluation mode.
        prompts: at least one id each; of a long one the last are seen, from ``window_start`` on.
        end_of_text: a row stops before this id; None: never.
        is_last: told of each row's token; true ends the row after it.

    Yields:
        The new token of each row that goes on.
    """
    assert prompts and all(prompts), "an empty prompt has nothing to continue"
    generators = [torch.Generator().manual_seed(derive_seed(seed, "generate", str(row))) for row in range(len(prompts))]
    texts = {row: list(prompt) for row, prompt in enumerate(prompts)}
    decoder = Decoder(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    for _ in range(max_new_tokens):
        logits = decoder.next_token_logits(list(texts.values()))
        drawn = {row: draw(logits[i], sampling, generators[row]) for i, row in enumerate(texts)}
        tokens = {row: token for row, token in drawn.items() if token != end_of_text}
        going_on = {row: token for row, token in tokens.items() if not is_last(row, token)}
        if tokens:
            yield tokens
        if not going_on:
            return
        if len(going_on) < len(texts):
            decoder.keep([i for i, row in enumerate(texts) if row in going_on])
        texts = {row: texts[row] for row in going_on}
        for row, token in going_on.items():
            texts[row].append(token)


class Decoder:
    """A model with a memory of the texts that it continues.

    Args:
        rows: texts side by side.
        longest: tokens that any of them will have at the end.
    """

    def __init__(self, model: GPT2, rows: int, longest: int) -> None:
        weight = model.wte.weight
        self.model = model
        self.cache = KeyValueCache(
            model.config,
            rows,
            min(longest, model.config.context_length),
            device=weight.device,
            dtype=weight.dtype,
        )
        self._starts: list[int] = []  # of the windows in the cache; none yet

    @torch.inference_mode()
    def next_token_logits(self, texts: list[list[int]]) -> Tensor:
        """Logits of the token after each text, (B, V) fp32 on the CPU.

        Args:
            texts: those of the last call with one more token each, or the first ones.
        """
        starts = [window_start(len(text), self.model.config.context_length) for text in texts]
        if starts == self._starts:
            windows = [text[-1:] for text in texts]
        else:
            windows = [text[start:] for text, start in zip(texts, starts, strict=True)]
            self.cache.clear()
            self._starts = starts
        lengths = [len(window) for window in windows]
        padded = [window + [PADDING] * (max(lengths) - len(window)) for window in windows]
        tokens = torch.tensor(padded, device=self.model.wte.weight.device)
        return self.model.next_token_logits(tokens, lengths, self.cache).float().cpu()

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Go on with these texts only."""
        self.cache.keep(rows)
        self._starts = [self._starts[row] for row in rows]


def window_start(length: int, context_length: int) -> int:
    """The first token of a text that the model sees when it looks for the next one.

    0 while the text fits. Then the window starts later in jumps of half a context, so that what is remembered
    serves for half a context of new tokens: positions are learned by place, and one that slides with each token would
    have to be computed anew with each.
    """
    half = max(context_length // 2, 1)
    surplus = max(length - context_length, 0)
    return -(-surplus // half) * half

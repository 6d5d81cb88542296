"""Generate token ids: draw a token from logits, and continue several prompts at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import SampleConfig
from pipeline.errors import TrainingError
from pipeline.generation.cuda_graphs import CudaGraphRecorder, Recorder, ReplayedStep, Step, next_power_of_2
from pipeline.model.attention import kernels_for_any_length
from pipeline.model.gpt2 import GPT2
from pipeline.model.key_value_cache import KeyValueCache
from pipeline.seeds import derive_seed

PADDING = 0  # any id: no token attends to it


def draw(logits: Tensor, sample: SampleConfig, generator: torch.Generator) -> int:
    """Draw the next token at random from its logits, and return the token's id.

    ``top_k`` limits the draw to the k most likely tokens. ``top_p`` limits it further, to the smallest set of these
    tokens with a total probability of at least ``top_p``. With temperature 0, the most likely token is returned.

    Args:
        logits: fp32 of shape (V,), on the CPU.
        generator: a random generator on the CPU.

    Raises:
        TrainingError: a logit is NaN or infinite.
    """
    values = logits.numpy()  # numpy needs a tenth of the time of torch for the next two operations
    if not np.isfinite(values).all():
        raise TrainingError("the model's logits are not finite; the model's weights are unusable")
    if sample.temperature == 0:
        return int(values.argmax())
    if sample.top_k is not None and sample.top_k < logits.numel():
        logits, ids = logits.topk(sample.top_k)
    elif sample.top_p is not None:
        logits, ids = logits.sort(descending=True, stable=True)
    else:
        ids = torch.arange(logits.numel())
    probabilities = torch.softmax(logits / sample.temperature, dim=0)
    if sample.top_p is not None:
        before = probabilities.cumsum(0) - probabilities  # the total of all more likely tokens
        probabilities = probabilities.masked_fill(before >= sample.top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def generate_batch(
    decoder: Decoder,
    prompts: list[list[int]],
    sample: SampleConfig,
    *,
    seed: int = 0,
    ends: AbstractSet[int] = frozenset(),
    stopped: AbstractSet[int] = frozenset(),
) -> Iterator[dict[int, int]]:
    """Continue several prompts at the same time. Yield at most ``sample.max_new_tokens`` times.

    Each prompt is a row of the batch with its own random generator. The tokens of a row do not depend on other rows,
    apart from rounding.

    Args:
        decoder: a decoder of a model in evaluation mode.
        prompts: the token ids of each prompt. A prompt has at least one id. If a prompt and its new tokens are
            longer than the model's context, the model sees only the newest tokens.
        sample: the options for sampling. Its ``prompt`` and ``stop`` are not used.
        ends: token ids that end a row. They are not yielded.
        stopped: rows that get no further tokens. The caller may add rows to this set between two yields.

    Yields:
        A dict from row to new token id, for each row that has not ended.
    """
    assert prompts and all(prompts), "a prompt is empty"
    generators = [torch.Generator().manual_seed(derive_seed(seed, "generate", str(row))) for row in range(len(prompts))]
    texts = {row: list(prompt) for row, prompt in enumerate(prompts)}
    decoder.start(len(prompts), max(map(len, prompts)) + sample.max_new_tokens)
    for _ in range(sample.max_new_tokens):
        logits = decoder.next_token_logits(list(texts.values()))
        drawn = {row: draw(logits[i], sample, generators[row]) for i, row in enumerate(texts)}
        tokens = {row: token for row, token in drawn.items() if token not in ends}
        if tokens:
            yield tokens
        unfinished = {row: [*texts[row], token] for row, token in tokens.items() if row not in stopped}
        if not unfinished:
            return
        if len(unfinished) < len(texts):
            decoder.keep([i for i, row in enumerate(texts) if row in unfinished])
        texts = unfinished


class Decoder:
    """Continues several texts with a model and a key-value cache.

    The cache and recorded CUDA graphs are used again for the next texts, so create only one ``Decoder`` per model.
    """

    def __init__(self, model: GPT2) -> None:
        self.model = model
        self.device = model.wte.weight.device
        #: Records the decoding step; see ``ReplayedStep``. If None, each step is computed without a recording.
        self.recorder: Recorder | None = CudaGraphRecorder(self.device) if self.device.type == "cuda" else None
        self._cache: KeyValueCache | None = None
        self._step: Step | None = None
        self._stored: list[list[int]] = []  # the tokens of each row of the cache

    def start(self, rows: int, longest: int) -> None:
        """Prepare the cache for a new batch of texts.

        Args:
            rows: the number of texts.
            longest: the number of tokens in the longest text, including generated tokens.
        """
        self._stored = []
        capacity = min(next_power_of_2(longest), self.model.config.context_length)
        if self._cache is not None and rows <= self._cache.rows and capacity <= self._cache.capacity:
            return
        if isinstance(self._step, ReplayedStep) and self._step.has_failed:
            self.recorder = None
        self._cache = self._step = None  # frees their memory
        # On a CPU, torch's attention of single tokens is several times slower in bf16 than in fp32.
        dtype = torch.float32 if self.device.type == "cpu" else self.model.wte.weight.dtype
        self._cache = KeyValueCache(self.model.config, rows, capacity, device=self.device, dtype=dtype)
        self._step = partial(self.model.decode, cache=self._cache)
        if self.recorder is not None:
            self._step = ReplayedStep(self._step, self._cache, self.recorder)

    @torch.inference_mode()
    def next_token_logits(self, texts: list[list[int]]) -> Tensor:
        """Return the logits for the next token of each text, fp32 of shape (B, V), on the CPU.

        This is fast if every text has one more token than in the previous call.

        Args:
            texts: the token ids of each whole text.
        """
        assert self._cache is not None and self._step is not None, "start must be called first"
        windows = [text[window_start(len(text), self.model.config.context_length) :] for text in texts]
        longest = max(map(len, windows))
        lengths = torch.tensor([[len(window)] for window in windows], device=self.device)
        with kernels_for_any_length():
            if self._stored == [window[:-1] for window in windows]:
                tokens = torch.tensor([window[-1:] for window in windows], device=self.device)
                logits = self._step(tokens, lengths - 1, longest)
            else:
                padded = [window + [PADDING] * (longest - len(window)) for window in windows]
                logits = self.model.prefill(torch.tensor(padded, device=self.device), lengths, self._cache)
        self._stored = windows
        return logits.float().cpu()

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Keep only the texts with the indices ``rows``, in this order."""
        assert self._cache is not None, "start must be called first"
        self._cache.keep(rows)
        self._stored = [self._stored[row] for row in rows]


def window_start(length: int, context_length: int) -> int:
    """Return the start of the model's window, as an index into a text. ``length`` is the text's number of tokens.

    If the text is longer than the context, the index is a multiple of half the context length. Such an index changes
    rarely, so the key-value cache stays valid for many tokens.
    """
    half = max(context_length // 2, 1)
    surplus = max(length - context_length, 0)
    return -(-surplus // half) * half

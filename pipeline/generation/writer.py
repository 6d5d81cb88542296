"""Complete prompts as text, with a checkpoint or with a model in training."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from data_tools.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, load_tokenizer
from pipeline.backends import Backend
from pipeline.checkpoint.loading import load_model
from pipeline.config.schema import Config, SampleConfig
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.generation.generate import draw, generate_batch
from pipeline.model.gpt2 import GPT2
from pipeline.model.packed_linear import pack_linear_layers
from pipeline.seeds import derive_seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_writer(checkpoint: Path, device: torch.device, dtype: str = "fp32") -> Writer:
    """Load a checkpoint to complete prompts.

    Args:
        checkpoint: a checkpoint folder, or a run folder, whose newest good checkpoint is used.
        dtype: a key of ``DTYPES``, the dtype of weights and matrix products.

    Raises:
        CheckpointError: there is no good checkpoint, or the vocabulary of the model is not GPT-2's.
    """
    loaded = load_model(checkpoint, device)
    if loaded.config.model.vocab_size != GPT2_VOCAB_SIZE:
        raise CheckpointError(
            f"{loaded.checkpoint}: model.vocab_size is {loaded.config.model.vocab_size}; "
            f"text needs a model of GPT-2's vocabulary, {GPT2_VOCAB_SIZE}"
        )
    model = loaded.model.to(DTYPES[dtype])
    model.assert_tied()
    pack_linear_layers(model, DTYPES[dtype])
    return Writer(model)


class Writer:
    """A model that completes text, with GPT-2's tokenizer. Its methods do not use ``sample.prompt``."""

    def __init__(self, model: GPT2) -> None:
        self.model = model
        self.tokenizer = load_tokenizer()

    def stream(self, prompt: str, sample: SampleConfig, seed: int) -> Iterator[str]:
        """Yield the completion of one prompt in pieces, each as soon as it is generated."""
        for _, piece in self._generate([prompt], sample, seed):
            yield piece

    def complete(self, prompts: Sequence[str], sample: SampleConfig, seed: int) -> list[str]:
        """Return the completions of several prompts, generated side by side."""
        completions = [""] * len(prompts)
        for row, piece in self._generate(prompts, sample, seed):
            completions[row] += piece
        return completions

    def _generate(self, prompts: Sequence[str], sample: SampleConfig, seed: int) -> Iterator[tuple[int, str]]:
        """Yield (index of the prompt, piece of its completion)."""
        streams = [TextStream(self.tokenizer.token_bytes, sample.stop) for _ in prompts]
        stopped: set[int] = set()
        for tokens in generate_batch(
            self.model,
            [self.tokenizer.encode(prompt).tolist() for prompt in prompts],
            sample,
            seed=seed,
            end_of_text=END_OF_TEXT,
            stopped=stopped,
        ):
            for row, token in tokens.items():
                yield row, streams[row].feed(token)
                if streams[row].stopped:
                    stopped.add(row)
        for row, stream in enumerate(streams):
            yield row, stream.finish()


class TextStream:
    """The text of one row of tokens.

    Args:
        token_bytes: the bytes of each token by id.
        stops: the stop texts. The text ends before the first stop text. A stop text must not be empty.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        assert all(stops), "a stop text is empty"
        self.stopped = False
        self._token_bytes = token_bytes
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may be the beginning of a stop text

    def feed(self, token: int) -> str:
        """Return the text that is final after this token. It is empty within a character or a possible stop text."""
        return self._release(self._decoder.decode(self._token_bytes[token]))

    def finish(self) -> str:
        """Return the rest of the text; an incomplete character becomes U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), is_last=True)

    def _release(self, new: str, *, is_last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that is a beginning of ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def prompt_loop(
    writer: Writer, sample: SampleConfig, seed: int, ask: Callable[[], str], show: Callable[[str], None]
) -> None:
    """Complete each prompt that ``ask`` returns, until ``ask`` raises EOFError. The seed grows by 1 per prompt.

    ``show`` receives the prompt, then each piece of text as soon as the piece is generated. Ctrl-C ends the current
    completion. If no completion is in progress, Ctrl-C raises KeyboardInterrupt.
    """
    while True:
        try:
            prompt = ask()
        except EOFError:
            return
        if not prompt:
            continue
        try:
            show(prompt)
            for piece in writer.stream(prompt, sample, seed):
                show(piece)
        except KeyboardInterrupt:
            show(" [interrupted]")
        show("\n")
        seed += 1


def complete_while_training(backend: Backend, config: Config, world: World) -> str:
    """Return the prompt of ``sample`` and its completion up to ``<|endoftext|>``.

    This call is collective: every rank must make it. Call this function within ``backend.evaluation_mode()``. Each
    token needs a forward pass over the whole text, because a wrapped model has no key-value cache. All ranks run
    ``max_new_tokens`` forward passes, even if ``<|endoftext|>`` comes earlier.
    """
    sample, tokenizer = config.sample, load_tokenizer()
    generator = torch.Generator().manual_seed(derive_seed(config.run.seed, "sample"))
    text = tokenizer.encode(sample.prompt).tolist()
    new: list[int] = []
    for _ in range(sample.max_new_tokens):
        window = torch.tensor([[*text, *new][-config.model.context_length :]], device=world.device)
        new.append(draw(backend(window, method="logits")[0, -1].float().cpu(), sample, generator))
    return sample.prompt + tokenizer.decode(new[: new.index(END_OF_TEXT)] if END_OF_TEXT in new else new)

"""Prompts continued by a checkpoint: tokenizer, model and sampling together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from data_tools.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, load_tokenizer
from pipeline.checkpoint import load_model
from pipeline.config.schema import SampleConfig
from pipeline.errors import CheckpointError
from pipeline.generation.generate import generate_batch
from pipeline.generation.sampling import Sampling
from pipeline.generation.text_stream import TextStream
from pipeline.model.gpt2 import GPT2
from pipeline.model.packed_linear import pack_linear_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def continue_prompt(checkpoint: Path, sample: SampleConfig, seed: int, device: torch.device) -> str:
    """The prompt and what the model writes after it, up to ``<|endoftext|>``; raises as ``load_writer``."""
    return sample.prompt + load_writer(checkpoint, device).continue_all([sample.prompt], sample, seed)[0]


def load_writer(checkpoint: Path, device: torch.device, dtype: str = "fp32") -> Writer:
    """A checkpoint that writes.

    Args:
        checkpoint: a checkpoint, or a run folder (its newest good one).
        dtype: of ``DTYPES``, in which weights are kept and products computed.

    Raises:
        CheckpointError: there is no good checkpoint at ``checkpoint``, or its ids are not GPT-2's.
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
    """A model of GPT-2's vocabulary, and the tokenizer."""

    def __init__(self, model: GPT2) -> None:
        self.model = model
        self.tokenizer = load_tokenizer()

    def stream(self, prompt: str, sample: SampleConfig, seed: int) -> Iterator[str]:
        """What comes after one prompt, in pieces as it is written."""
        for _, piece in self._write([prompt], sample, seed):
            yield piece

    def continue_all(self, prompts: Sequence[str], sample: SampleConfig, seed: int) -> list[str]:
        """What comes after each of several prompts, written side by side."""
        texts = [""] * len(prompts)
        for row, piece in self._write(prompts, sample, seed):
            texts[row] += piece
        return texts

    def _write(self, prompts: Sequence[str], sample: SampleConfig, seed: int) -> Iterator[tuple[int, str]]:
        """Pieces of text with their prompts' numbers; ``sample.prompt`` has no part in it."""
        streams = [TextStream(self.tokenizer.token_bytes, sample.stop) for _ in prompts]
        pieces: list[tuple[int, str]] = []

        def is_last(row: int, token: int) -> bool:
            pieces.append((row, streams[row].feed(token)))
            return streams[row].stopped

        rows = [self.tokenizer.encode(prompt).tolist() for prompt in prompts]
        sampling = Sampling(sample.temperature, sample.top_k, sample.top_p)
        tokens = generate_batch(
            self.model, rows, sample.max_new_tokens, sampling, seed=seed, end_of_text=END_OF_TEXT, is_last=is_last
        )
        for _ in tokens:
            yield from pieces
            pieces.clear()
        for row, stream in enumerate(streams):
            yield row, stream.finish()


def prompt_loop(
    writer: Writer, sample: SampleConfig, seed: int, ask: Callable[[], str], show: Callable[[str], None]
) -> None:
    """Continue one prompt after the other until there are no more; Ctrl-C ends a text, and at the prompt the loop.

    Args:
        seed: of the first prompt; each has the next one.
        ask: the next prompt.
        show: is given each piece of text when it is written, the prompt first.

    Raises:
        KeyboardInterrupt: Ctrl-C at the prompt.
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

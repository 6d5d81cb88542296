"""Complete prompts as text, with the model of a checkpoint or with a model that is being trained."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from itertools import takewhile
from pathlib import Path

import torch

from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.backends import Backend
from pipeline.checkpoint.loading import load_text_model
from pipeline.config.schema import Config, SampleConfig
from pipeline.distributed.world import World
from pipeline.generation.generate import Decoder, draw, generate_batch
from pipeline.model.attention import kernels_for_any_length
from pipeline.model.gpt2 import GPT2
from pipeline.model.packed_linear import pack_linear_layers
from pipeline.seeds import derive_seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENDS = frozenset({END_OF_TEXT})  # the tokens before which a completion ends


def load_text_generator(
    checkpoint: Path | str,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    weights: str = "training",
    prompts: int = 1,
) -> TextGenerator:
    """Load the model of a checkpoint into a ``TextGenerator``.

    Args:
        checkpoint: the path or URL of a checkpoint folder or a run folder. From a run folder, the newest good
            checkpoint is used.
        dtype: ``fp32`` or ``bf16``.
        weights: ``training`` for the trained weights, or ``ema`` for their moving average.
        prompts: the usual number of prompts per call. On a CPU, the model is optimized for this number.

    Raises:
        CheckpointError: there is no good checkpoint, the checkpoint lacks the chosen weights, or its vocabulary is not
            GPT-2's.
    """
    loaded = load_text_model(checkpoint, device, weights)
    model = loaded.model.to(DTYPES[dtype])
    model.assert_tied()
    pack_linear_layers(model, DTYPES[dtype], rows=prompts)
    return TextGenerator(model, loaded.config.sample)


class TextGenerator:
    """Completes prompts with a model and GPT-2's tokenizer.

    The attribute ``sample`` contains the sampling options from the run's config. The methods use the options that the
    caller passes, not this attribute.
    """

    def __init__(self, model: GPT2, sample: SampleConfig) -> None:
        self.model = model
        self.decoder = Decoder(model)
        self.sample = sample
        self.tokenizer = load_tokenizer()

    def stream(self, prompt: str, sample: SampleConfig, seed: int) -> Iterator[str]:
        """Yield the completion of a prompt in pieces of text, each as soon as it is generated."""
        return self.stream_tokens(self._encode(prompt), sample, seed)

    def stream_tokens(
        self, prompt: list[int], sample: SampleConfig, seed: int, ends: AbstractSet[int] = ENDS
    ) -> Iterator[str]:
        """Yield the completion of a prompt of token ids, in pieces of text.

        The completion ends before the first token that is in ``ends``.
        """
        for _, piece in self._generate([prompt], sample, seed, ends):
            yield piece

    def complete(self, prompts: Sequence[str], sample: SampleConfig, seed: int) -> list[str]:
        """Return the completions of several prompts, computed in one batch."""
        return self.complete_tokens([self._encode(prompt) for prompt in prompts], sample, seed)

    def complete_tokens(self, prompts: list[list[int]], sample: SampleConfig, seed: int) -> list[str]:
        """Return the completions of several prompts of token ids, computed in one batch."""
        completions = [""] * len(prompts)
        for row, piece in self._generate(prompts, sample, seed, ENDS):
            completions[row] += piece
        return completions

    def _encode(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt. An empty prompt becomes the token that begins each document."""
        return self.tokenizer.encode(prompt).tolist() or [END_OF_TEXT]

    def _generate(
        self, prompts: list[list[int]], sample: SampleConfig, seed: int, ends: AbstractSet[int]
    ) -> Iterator[tuple[int, str]]:
        """Yield (index of the prompt, piece of its completion)."""
        streams = [TextStream(self.tokenizer.token_bytes, sample.stop) for _ in prompts]
        stopped: set[int] = set()
        for tokens in generate_batch(
            self.decoder,
            prompts,
            sample,
            seed=seed,
            ends=ends,
            stopped=stopped,
        ):
            for row, token in tokens.items():
                yield row, streams[row].feed(token)
                if streams[row].stopped:
                    stopped.add(row)
        for row, stream in enumerate(streams):
            yield row, stream.finish()


class TextStream:
    """Converts generated tokens to text, one token at a time.

    Args:
        token_bytes: the bytes of each token, by token id.
        stops: texts that end the stream. They are not part of the output.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        assert all(stops), "a stop text is empty"
        self.stopped = False
        self._token_bytes = token_bytes
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may be the beginning of a stop text

    def feed(self, token: int) -> str:
        """Add a token, and return the text that can be shown now, which may be empty.

        Incomplete characters and possible beginnings of a stop text are held back.
        """
        return self._release(self._decoder.decode(self._token_bytes[token]))

    def finish(self) -> str:
        """Return the rest of the text. An incomplete character becomes U+FFFD."""
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
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def prompt_loop(
    complete: Callable[[str, int], Generator[str]], seed: int, ask: Callable[[], str], show: Callable[[str], None]
) -> None:
    """Ask for prompts and show their completions, until ``ask`` raises EOFError.

    Ctrl-C ends the current completion. Between completions, Ctrl-C ends the loop.

    Args:
        complete: takes a prompt and a seed, and yields pieces of text to show.
        seed: the seed for the first prompt. The seed increases by 1 per prompt.
    """
    while True:
        try:
            prompt = ask()
        except (EOFError, KeyboardInterrupt):
            return
        if not prompt:
            continue
        try:
            with closing(complete(prompt, seed)) as pieces:
                for piece in pieces:
                    show(piece)
        except KeyboardInterrupt:
            show(" [interrupted]")
        show("\n")
        seed += 1


def complete_while_training(
    backend: Backend, config: Config, world: World, before_token: Callable[[], None] = lambda: None
) -> str:
    """Return the prompt in the config section ``sample``, followed by its completion.

    Every rank must call this function, within ``backend.evaluation_mode()``. Generation is slow here, because it uses
    no key-value cache.

    Args:
        before_token: is called on every rank before each token.
    """
    sample, tokenizer = config.sample, load_tokenizer()
    generator = torch.Generator().manual_seed(derive_seed(config.run.seed, "sample"))
    text = tokenizer.encode(sample.prompt).tolist()
    new: list[int] = []
    for _ in range(sample.max_new_tokens):
        before_token()
        world.progress.pass_mark()
        window = torch.tensor([[*text, *new][-config.model.context_length :]], device=world.device)
        with kernels_for_any_length():
            logits = backend(window, method="logits")[0, -1]
        new.append(draw(logits.float().cpu(), sample, generator))
    completion = TextStream(tokenizer.token_bytes, sample.stop)
    pieces = [completion.feed(token) for token in takewhile(lambda token: token != END_OF_TEXT, new)]
    return "".join([sample.prompt, *pieces, completion.finish()])

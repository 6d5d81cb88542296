"""A checkpoint completes prompts as text. The pieces that are shown while it is generated are the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_tools.shards.manifest import TokenizerRecord, other_tokenizer
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import GPT2_VOCAB_SIZE
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint.state import TrainingState
from pipeline.config.loading import dump_config
from pipeline.config.schema import SampleConfig
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.generation.text_generator import TextStream, complete_while_training, load_text_generator
from pipeline.model.gpt2 import build_model
from tests.pipeline.conftest import VOCAB_SIZE, tiny_config
from tests.support.checkpoints import save_checkpoint

CPU = torch.device("cpu")
PROMPT = "Grüße, world"
BYTES = [bytes([byte]) for byte in range(256)]  # one token per byte cuts every character as often as possible


def save_model(run_folder: Path, world: World, vocab_size: int, tokenizer: TokenizerRecord | None = None) -> Path:
    config = tiny_config(run_folder, model={"vocab_size": vocab_size})
    backend = DdpBackend(build_model(config.model, 1), config, world)
    state = TrainingState(1, 4, 48, 1, 1.0, 0, 1337, tokenizer=tokenizer)
    save_checkpoint(run_folder, state, dump_config(config), backend, world, 1)
    return run_folder


@pytest.fixture
def run_folder(tmp_path: Path, world: World) -> Path:
    return save_model(tmp_path, world, GPT2_VOCAB_SIZE)


def sample(**options: Any) -> SampleConfig:
    return SampleConfig(prompt=PROMPT, **{"max_new_tokens": 5, **options})


def complete(run_folder: Path, options: SampleConfig, seed: int) -> str:
    return load_text_generator(run_folder).complete([options.prompt], options, seed)[0]


def test_max_new_tokens_limits_the_completion(run_folder: Path) -> None:
    text = complete(run_folder, sample(temperature=0.0), seed=0)
    shorter = complete(run_folder, sample(temperature=0.0, max_new_tokens=2), seed=0)
    assert 0 < len(shorter) < len(text)


def test_the_seed_and_the_sampling_options_decide_the_draws(run_folder: Path) -> None:
    texts = [complete(run_folder, sample(), seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = complete(run_folder, sample(temperature=0.0), seed=0)
    assert complete(run_folder, sample(top_k=1), seed=3) == greedy


def test_a_model_with_another_vocabulary_is_an_error(tmp_path: Path, world: World) -> None:
    run_folder = save_model(tmp_path, world, VOCAB_SIZE)
    with pytest.raises(CheckpointError, match=f"vocab_size is {VOCAB_SIZE}; .* 50257"):
        complete(run_folder, sample(), seed=0)
    run_folder = save_model(tmp_path / "same_size", world, GPT2_VOCAB_SIZE, other_tokenizer(GPT2_VOCAB_SIZE))
    with pytest.raises(
        CheckpointError, match="the model's tokens are of the tokenizer 'other' .*; text needs a model of"
    ):
        complete(run_folder, sample(), seed=0)


def pieces(text: bytes, *stops: str) -> list[str]:
    """Return the text that is released after each byte, then the rest."""
    stream = TextStream(BYTES, stops)
    shown = [stream.feed(byte) for byte in text]
    return [*shown, stream.finish()]


def test_a_character_is_released_when_it_is_complete() -> None:
    assert pieces("aß🎉".encode()) == ["a", "", "ß", "", "", "", "🎉", ""]


def test_invalid_utf8_is_replaced() -> None:
    for broken in (b"\xf0\x9f", b"a\xffb", b"\xc3a", b"\xe2\x82"):
        assert "".join(pieces(broken)) == broken.decode(errors="replace")


def test_the_pieces_of_tokens_are_the_text() -> None:
    tokenizer = load_tokenizer()
    text = "Grüße, 世界! 🎉🏳️‍🌈 ½ naïve"
    tokens = tokenizer.encode(text).tolist()
    stream = TextStream(tokenizer.token_bytes)
    assert "".join([*map(stream.feed, tokens), stream.finish()]) == text
    assert len(tokens) < len(text.encode())  # some tokens hold bytes of several characters


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one. two.", ["."], "one"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("xyz", ["zz", "yz"], "x"),
        ("Ende ß.", ["ß"], "Ende "),
        ("ends with a", ["abc"], "ends with a"),
        ("stop", ["stop"], ""),
    ],
)
def test_the_text_ends_before_the_first_stop_text(text: str, stops: list[str], expected: str) -> None:
    shown = pieces(text.encode(), *stops)
    assert "".join(shown) == expected


def test_a_possible_beginning_of_a_stop_text_is_held_back() -> None:
    assert pieces(b"abcx", "bcd") == ["a", "", "", "bcx", ""]
    assert pieces(b"abcd!", "bcd") == ["a", "", "", "", "", ""]


def test_stopped() -> None:
    stream = TextStream(BYTES, ["b"])
    stream.feed(ord("a"))
    assert not stream.stopped
    stream.feed(ord("b"))
    assert stream.stopped


def test_a_completion_while_training_ends_before_a_stop_text(tmp_path: Path, world: World) -> None:
    """The kernel of cuDNN, which training uses, would need time for each new length."""
    config = tiny_config(
        tmp_path, model={"vocab_size": GPT2_VOCAB_SIZE}, sample={"prompt": PROMPT, "max_new_tokens": 5}
    )
    backend = DdpBackend(build_model(config.model, 1), config, world)
    with backend.evaluation_mode():
        whole = complete_while_training(backend, config, world)
        new = whole.removeprefix(PROMPT)
        stop = new[len(new) // 2 :][:3]
        stopped = config.model_copy(update={"sample": config.sample.model_copy(update={"stop": [stop]})})
        assert complete_while_training(backend, stopped, world) == PROMPT + new[: new.index(stop)]
        tokens: list[None] = []
        used: list[bool] = []
        hook = backend.model.register_forward_pre_hook(lambda *_: used.append(torch.backends.cuda.cudnn_sdp_enabled()))
        with hook, sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
            complete_while_training(backend, config, world, lambda: tokens.append(None))
        assert len(tokens) == 5 and used == [False] * 5

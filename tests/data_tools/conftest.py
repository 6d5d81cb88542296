"""Corpora and helpers shared by the tests of stage 1."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data_tools.shards import load_manifest, open_split
from data_tools.tokenizer import END_OF_TEXT, load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = REPOSITORY / "launch" / "tokenize_corpus.py"

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    """The environment of a child process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def command_line(*arguments: object) -> list[str]:
    """The command of stage 1 with arguments."""
    return [sys.executable, str(COMMAND), *map(str, arguments)]


@pytest.fixture
def run_process(tmp_path: Path) -> Command:
    """Run stage 1 as a user does, in a fresh folder."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(*arguments),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def reference() -> tiktoken.Encoding:
    """tiktoken itself, whose ``encode_ordinary`` is what tokens must equal."""
    return load_tokenizer()._encoding


def sequential_tokens(reference: tiktoken.Encoding, documents: Sequence[str]) -> np.ndarray:
    """The tokens of documents by the plainest loop there is."""
    tokens: list[int] = []
    for document in documents:
        tokens += [END_OF_TEXT, *reference.encode_ordinary(document)]
    return np.array(tokens, dtype=np.uint16)


def tokens_of(folder: Path, split: str = "train") -> np.ndarray:
    """All tokens of a split."""
    stream = open_split(folder, split)
    return stream.read(0, stream.tokens)


def documents_of(folder: Path) -> int:
    """Documents of all splits."""
    return sum(shard.documents for shard in load_manifest(folder).shards)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def varied_documents(count: int) -> list[str]:
    """Distinct documents of many lengths and scripts, none of them empty."""
    snippets = [
        "The quick brown fox jumps over the lazy dog. ",
        "def f(x):\n\treturn x ** 2\r\n",
        "Ünïcödé, 漢字かな交じり文, русский текст, عربى, हिन्दी. ",
        "🙂👩‍👩‍👧‍👦 emoji; math ∑∂; \u200b zero width; ",
        "<|endoftext|> is only text here. ",
        "       \n\n\n   spaces\t\t",
        "3.14159265358979 0xDEADBEEF 1e-9 ",
        "\x00\x01 control \x7f",
    ]
    generator = np.random.default_rng(7)
    return [
        f"{index}: " + "".join(generator.choice(snippets, size=int(generator.integers(1, 40))))
        for index in range(count)
    ]

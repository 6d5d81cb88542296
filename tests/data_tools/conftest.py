"""Corpora and helpers shared by the tests of stage 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiktoken

from data_tools.corpus import chunks
from data_tools.corpus.split import draw_split
from data_tools.encoding.documents import fingerprint_of, utf8_of
from data_tools.shards import load_manifest, open_split
from data_tools.tokenizer import END_OF_TEXT, load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = REPOSITORY / "launch" / "tokenize_corpus.py"
#: Stage 1 as a user runs it, but with work cut so small that a tiny corpus has many chunks.
COMMAND_WITH_SMALL_CHUNKS = """
import runpy, sys
from data_tools.corpus import chunks
chunks._SMALLEST_CHUNK_BYTES = int(sys.argv.pop(1))
sys.argv[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CHUNK_BYTES = 3000

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    """The environment of a child process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def command_line(*arguments: object, chunk_bytes: int | None = None) -> list[str]:
    """The command of stage 1 with arguments; ``chunk_bytes`` is the size to which chunks are cut."""
    start = ["-c", COMMAND_WITH_SMALL_CHUNKS, str(chunk_bytes)] if chunk_bytes else []
    return [sys.executable, *start, str(COMMAND), *map(str, arguments)]


@pytest.fixture
def run_process(tmp_path: Path) -> Command:
    """Run stage 1 as a user does, in a fresh folder."""

    def run(*arguments: object, chunk_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(*arguments, chunk_bytes=chunk_bytes),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the work of this process into chunks of ``CHUNK_BYTES`` of text."""
    monkeypatch.setattr(chunks, "_SMALLEST_CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture(scope="session")
def reference() -> tiktoken.Encoding:
    """tiktoken itself, whose ``encode_ordinary`` is what tokens must equal."""
    return load_tokenizer()._encoding


def sequential_tokens(reference: tiktoken.Encoding, documents: Iterable[str]) -> np.ndarray:
    """The tokens of documents by the plainest loop there is."""
    tokens: list[int] = []
    for document in documents:
        tokens += [END_OF_TEXT, *reference.encode_ordinary(document)]
    return np.array(tokens, dtype=np.uint16)


def drawn_for(split: str, documents: Iterable[str], val_fraction: float, seed: int = 0) -> list[str]:
    """The documents that the draw puts into a split."""

    def drawn(document: str) -> str:
        fingerprint = fingerprint_of(document, utf8_of(document))
        return draw_split(fingerprint, val_fraction=val_fraction, seed=seed)

    return [document for document in documents if drawn(document) == split]


def tokens_of(folder: Path, split: str = "train") -> np.ndarray:
    """All tokens of a split; none if it is not there."""
    if split not in load_manifest(folder).splits():
        return np.empty(0, dtype=np.uint16)
    stream = open_split(folder, split)
    return stream.read(0, stream.tokens)


def documents_of(folder: Path) -> int:
    """Documents of all splits."""
    return sum(shard.documents for shard in load_manifest(folder).shards)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def result(folder: Path) -> dict[str, bytes | str]:
    """What a finished folder holds, but when and with what it was made; nothing else may be in it."""
    manifest = load_manifest(folder)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *(shard.file for shard in manifest.shards)}
    shards = {shard.file: (folder / shard.file).read_bytes() for shard in manifest.shards}
    return {**shards, "manifest.json": manifest.content_sha256()}


def states(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Inode and time of change of files: equal states, untouched files."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 30) -> None:
    """Wait for what a process does; fails if it ends before."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None or condition(), "it ended too early"
        assert time.monotonic() < deadline_s, "it took too long"
        time.sleep(0.002)


def json_lines(texts: Sequence[str]) -> bytes:
    """JSON Lines with the texts under ``text``."""
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(texts))


def zstd(content: bytes) -> bytes:
    """Compressed as a ``.zst`` file."""
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


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

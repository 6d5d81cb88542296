"""Corpora and helpers shared by the tests of stage 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiktoken

from data_tools.corpus import chunks
from data_tools.corpus.split import draw_split
from data_tools.encoding.documents import Document, fingerprint_of, utf8_of
from data_tools.shards.manifest import load_manifest
from data_tools.shards.reader import open_split
from data_tools.sources import Source
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from tests.support.runs import PYTHON_PATH, REPOSITORY

COMMAND = REPOSITORY / "launch" / "tokenize_corpus.py"
#: The command of stage 1, but with chunks so small that a tiny corpus has many of them.
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
    """Return the environment of a child process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": PYTHON_PATH, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def command_line(*arguments: object, chunk_bytes: int | None = None) -> list[str]:
    """Return the command of stage 1 with arguments; ``chunk_bytes`` is the smallest size of a chunk."""
    start = ["-c", COMMAND_WITH_SMALL_CHUNKS, str(chunk_bytes)] if chunk_bytes else []
    return [sys.executable, *start, str(COMMAND), *map(str, arguments)]


@pytest.fixture
def run_process(tmp_path: Path) -> Command:
    """Return a function that runs the command of stage 1 in an empty folder."""

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
    """Make this process cut sources into chunks of ``CHUNK_BYTES`` of text."""
    monkeypatch.setattr(chunks, "_SMALLEST_CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture(scope="session")
def reference() -> tiktoken.Encoding:
    """Return tiktoken itself. All tokens must equal those of its ``encode_ordinary``."""
    return load_tokenizer()._encoding


def sequential_tokens(reference: tiktoken.Encoding, documents: Iterable[str]) -> np.ndarray:
    """Return the tokens of documents, encoded one after the other."""
    tokens: list[int] = []
    for document in documents:
        tokens += [END_OF_TEXT, *reference.encode_ordinary(document)]
    return np.array(tokens, dtype=np.uint16)


def drawn_for(split: str, documents: Iterable[str], val_fraction: float, seed: int = 0) -> list[str]:
    """Return the documents that are drawn for a split."""

    def drawn(document: str) -> str:
        fingerprint = fingerprint_of(document, utf8_of(document))
        return draw_split(fingerprint, val_fraction=val_fraction, seed=seed)

    return [document for document in documents if drawn(document) == split]


def tokens_of(folder: Path, split: str = "train") -> np.ndarray:
    """Return all tokens of a split, or an empty array if the split does not exist."""
    if split not in load_manifest(folder).splits():
        return np.empty(0, dtype=np.uint16)
    stream = open_split(folder, split)
    return stream.read(0, stream.tokens)


def read_documents(source: Source, slice_bytes: int = 1 << 30) -> Iterator[Document]:
    """Yield all documents of a source in order."""
    for source_slice in source.slices(slice_bytes):
        yield from source.read(source_slice)


def documents_of(folder: Path) -> int:
    """Return the number of documents in all splits."""
    return sum(shard.documents for shard in load_manifest(folder).shards)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file below a folder by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def result(folder: Path) -> dict[str, bytes | str]:
    """Return the shards and the manifest's content hash of a complete folder. It must not hold other files."""
    manifest = load_manifest(folder)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *(shard.file for shard in manifest.shards)}
    shards = {shard.file: (folder / shard.file).read_bytes() for shard in manifest.shards}
    return {**shards, "manifest.json": manifest.content_sha256()}


def states(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Return inode and modification time of files. Equal states mean that no file was written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 30) -> None:
    """Wait until a condition holds; fail if the process ends before."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None or condition(), "the process ended before the condition held"
        assert time.monotonic() < deadline_s, "timeout"
        time.sleep(0.002)


def json_lines(texts: Sequence[str]) -> bytes:
    """Return JSON Lines with the texts in the field ``text``."""
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(texts))


def zstd(content: bytes) -> bytes:
    """Return the bytes compressed as a ``.zst`` file."""
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def varied_documents(count: int) -> list[str]:
    """Return distinct documents of many lengths and scripts, none of them empty."""
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

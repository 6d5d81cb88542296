"""Token files of every format for tests, and ways to damage them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st

from data_tools.formats import inspection, megatron, plan
from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.shards.manifest import Manifest, SourceRecord, load_manifest
from data_tools.shards.reader import open_split
from data_tools.shards.writer import ShardWriter
from data_tools.storage.atomic import write_json_durably
from data_tools.tokenizer import load_tokenizer

END = 50256
LLMC_MAGIC, LLMC_VERSION = 20240520, 1

Tokens = npt.NDArray[np.uint16]
Totals = dict[str, tuple[list[int], int, int]]  # per split: tokens, number of documents, bytes of text
Damage = Callable[[Path], None]

token_ids = st.integers(0, END) | st.just(END)
token_runs = st.lists(token_ids, min_size=1, max_size=120).map(lambda ids: np.array(ids, dtype=np.uint16))
few_examples = settings(max_examples=20, deadline=None, derandomize=True)


@contextmanager
def small_pieces(tokens: int = 16) -> Iterator[Path]:
    """Yield an empty folder. In the block, everything is read and written in pieces of ``tokens``."""
    with (
        TemporaryDirectory() as folder,
        mock.patch.object(plan, "READ_TOKENS", tokens),
        mock.patch.object(megatron, "BLOCK_DOCUMENTS", 3),
        mock.patch.object(inspection, "_READ_TOKENS", tokens),
    ):
        yield Path(folder)


def utf8_bytes_of(tokens: Sequence[int] | Tokens) -> int:
    """Return the number of bytes of the decoded text."""
    return len(load_tokenizer()._encoding.decode_bytes([int(token) for token in tokens if token != END]))


def write_ours(folder: Path, splits: dict[str, list[Tokens]], format: str = "npy") -> Manifest:
    folder.mkdir()
    records = []
    for split, shards in splits.items():
        for index, tokens in enumerate(shards):
            writer = ShardWriter(folder, f"{split}_{index:06d}.{format}", split)
            writer.append(tokens, documents=int((tokens == END).sum()), utf8_bytes=utf8_bytes_of(tokens))
            records.append(writer.close())
    manifest = Manifest(
        gpt2_tokenizer_record(), SourceRecord("text", {"inputs": ["a"]}), {"format": format}, tuple(records)
    )
    write_json_durably(folder / "manifest.json", manifest.to_json())
    return manifest


def totals(folder: Path) -> Totals:
    """Return the tokens, the number of documents and the bytes of text of each split."""
    manifest = load_manifest(folder)
    found: Totals = {}
    for split in manifest.splits():
        shards = manifest.shards_of(split)
        tokens: Sequence[int] | Tokens = (
            open_split(folder, split).read(0, manifest.tokens_of(split)) if manifest.tokens_of(split) else []
        )
        found[split] = (
            [int(token) for token in tokens],
            sum(shard.documents for shard in shards),
            sum(shard.utf8_bytes for shard in shards),
        )
    return found


def documents(count: int, seed: int = 0) -> Tokens:
    """Return documents of 1 to 40 random tokens, with ``END_OF_TEXT`` before each."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 41, count)
    return np.concatenate([[END, *generator.integers(0, END, size)] for size in sizes]).astype(np.uint16)


def write_llmc(
    path: Path, tokens: Sequence[int] | Tokens, magic: int = LLMC_MAGIC, version: int = LLMC_VERSION
) -> None:
    """Write a shard as llm.c's ``write_datafile`` does."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype="<u2").tobytes())


def write_megatron(
    prefix: Path,
    sequences: Sequence[Sequence[Sequence[int]]],
    dtype: str = "<u2",
    code: int = 8,
    append_eod: bool = False,
) -> None:
    """Write documents of sequences of tokens as Megatron's ``MMapIndexedDatasetBuilder`` does."""
    flat: list[list[int]] = []
    boundaries = [0]
    for document in sequences:
        flat += [list(sequence) for sequence in document]
        if append_eod and document:
            flat[-1].append(END)
        boundaries.append(len(flat))
    tokens: npt.NDArray[np.integer] = np.array([token for sequence in flat for token in sequence], dtype=dtype)
    sizes = np.array([len(sequence) for sequence in flat], dtype="<i4")
    pointers = (np.cumsum(sizes, dtype="<i8") - sizes) * tokens.itemsize
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sizes), len(boundaries))
        + sizes.tobytes()
        + pointers.astype("<i8").tobytes()
        + np.array(boundaries, dtype="<i8").tobytes()
    )


def edit(name: str, change: Callable[[bytearray], object]) -> Damage:
    """Return a function that damages a file. ``change`` edits the bytes in place, or returns the new bytes."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        changed = change(content)
        (folder / name).write_bytes(changed if isinstance(changed, (bytes, bytearray)) else content)

    return damage


def put(name: str, offset: int, layout: str, value: int) -> Damage:
    return edit(name, lambda content: struct.pack_into(layout, content, offset, value))


def cut(name: str, count: int) -> Damage:
    return edit(name, lambda content: content[:-count])


def write_sound(folder: Path, format: str) -> None:
    folder.mkdir()
    if format == "nanogpt":
        np.arange(50, dtype="<u2").tofile(folder / "train.bin")
        np.arange(9, dtype="<u2").tofile(folder / "val.bin")
    elif format == "llmc":
        write_llmc(folder / "x_train_000001.bin", range(100))
        write_llmc(folder / "x_val_000000.bin", range(9))
    elif format == "npy":
        np.save(folder / "edufineweb_val_000000.npy", np.arange(9, dtype=np.uint16))
        np.save(folder / "edufineweb_train_000001.npy", np.arange(50, dtype=np.uint16))
    else:
        write_megatron(folder / "x", [[[1, 2], [3]], [[4, 5, 6]]])

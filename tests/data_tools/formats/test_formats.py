"""Tokens go to the formats of other programs and come back the same, and damaged files are refused by name."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import DataError
from data_tools.formats import (
    ConvertRequest,
    adopt_in_place,
    convert,
    first_documents,
    inspect,
    inspection,
    megatron,
    open_collection,
    plan,
)
from data_tools.shards import (
    Manifest,
    ShardWriter,
    SourceRecord,
    load_manifest,
    open_split,
    verify,
)
from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.storage.atomic import write_json_durably
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.conftest import environment

END = 50256
LLMC_MAGIC, LLMC_VERSION = 20240520, 1

Tokens = npt.NDArray[np.uint16]
Totals = dict[str, tuple[list[int], int, int]]

token_ids = st.integers(0, END) | st.just(END)
token_runs = st.lists(token_ids, max_size=120).map(lambda ids: np.array(ids, dtype=np.uint16))
few_examples = settings(max_examples=20, deadline=None, derandomize=True)


@contextmanager
def small_pieces(tokens: int = 16) -> Iterator[Path]:
    """An empty folder, while everything is read and written in pieces of so many tokens."""
    with (
        TemporaryDirectory() as folder,
        mock.patch.object(plan, "CHUNK_TOKENS", tokens),
        mock.patch.object(megatron, "BLOCK_DOCUMENTS", 3),
        mock.patch.object(inspection, "_READ_TOKENS", tokens),
    ):
        yield Path(folder)


def utf8_bytes_of(tokens: Sequence[int] | Tokens) -> int:
    """Bytes of text by decoding it."""
    return len(load_tokenizer()._encoding.decode_bytes([int(token) for token in tokens if token != END]))


def write_ours(folder: Path, splits: dict[str, list[Tokens]], format: str = "npy") -> Manifest:
    """A folder of ours: a shard an array."""
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
    """Of each split its tokens, documents and bytes of text."""
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
    """Documents of 1 to 40 tokens, ``END_OF_TEXT`` before each."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 41, count)
    return np.concatenate([[END, *generator.integers(0, END, size)] for size in sizes]).astype(np.uint16)


def write_llmc(
    path: Path, tokens: Sequence[int] | Tokens, magic: int = LLMC_MAGIC, version: int = LLMC_VERSION
) -> None:
    """As llm.c's ``write_datafile`` does."""
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
    """As Megatron's ``MMapIndexedDatasetBuilder`` does: documents of sequences of tokens."""
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


class TestRoundTrips:
    @few_examples
    @given(
        train=token_runs,
        val=token_runs,
        to=st.sampled_from(["npy", "arrow", "nanogpt", "llmc"]),
        size=st.integers(10, 60),
    )
    def test_there_and_back(self, train: Tokens, val: Tokens, to: str, size: int) -> None:
        with small_pieces() as folder:
            write_ours(folder / "ours", {"train": [train[:7], train[7:]], "val": [val]})
            shard_tokens = None if to == "nanogpt" else size
            convert(ConvertRequest(source=folder / "ours", out=folder / "there", to=to, shard_tokens=shard_tokens))
            back = ConvertRequest(
                source=folder / "there",
                source_format=to if to in ("nanogpt", "llmc") else "native",
                out=folder / "back",
                to="npy",
                shard_tokens=size,
            )
            convert(back)
            assert totals(folder / "back") == totals(folder / "ours")
            verify(folder / "back")

    @pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 32, 33])
    @pytest.mark.parametrize("to", ["npy", "arrow", "nanogpt", "llmc"])
    def test_sizes_around_those_of_the_pieces(self, to: str, size: int) -> None:
        tokens: Tokens = np.arange(size, dtype=np.uint16)
        with small_pieces() as folder:
            write_ours(folder / "ours", {"train": [tokens]})
            convert(ConvertRequest(source=folder / "ours", out=folder / "there", to=to))
            collection = open_collection(folder / "there")
            stream = collection.splits["train"].stream
            assert stream.tokens == size
            assert stream.read(0, size).tolist() == tokens.tolist()

    def test_npy_to_arrow_and_back_is_the_same_folder(self, tmp_path: Path) -> None:
        ours = write_ours(tmp_path / "ours", {"train": [documents(50), documents(9, 1)], "val": [documents(7, 2)]})
        convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "arrow", to="arrow"))
        convert(ConvertRequest(source=tmp_path / "arrow", out=tmp_path / "npy", to="npy"))
        assert load_manifest(tmp_path / "npy").content_sha256() == ours.content_sha256()
        for shard in ours.shards:
            assert (tmp_path / "npy" / shard.file).read_bytes() == (tmp_path / "ours" / shard.file).read_bytes()

    def test_through_nanogpt_the_shards_are_those_of_stage_1(self, tmp_path: Path) -> None:
        """Cut before the document that would take them past their size, whatever file they came in."""
        everything = documents(100)
        starts = [*np.flatnonzero(everything == END).tolist(), everything.size]
        convert_to = {"to": "npy", "shard_tokens": 200}
        write_ours(tmp_path / "ours", {"train": [everything]})
        convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "nanogpt", to="nanogpt"))
        convert(ConvertRequest(source=tmp_path / "nanogpt", out=tmp_path / "back", **convert_to))  # type: ignore[arg-type]
        at = 0
        for shard in load_manifest(tmp_path / "back").shards:
            stop = at + shard.tokens
            assert stop in starts and shard.tokens <= 200
            following = [start for start in starts if start > stop]
            assert not following or following[0] - at > 200, "another document had found room"
            at = stop
        assert at == everything.size

    def test_a_document_larger_than_a_shard_has_one_of_its_own(self) -> None:
        large = np.full(100, 7, dtype=np.uint16)
        tokens = np.concatenate([[END, 1], [END], large, [END, 2], [END, 3]]).astype(np.uint16)
        with small_pieces() as folder:
            tokens.tofile(folder / "train.bin")
            convert(ConvertRequest(source=folder / "train.bin", out=folder / "out", to="npy", shard_tokens=10))
            assert [shard.tokens for shard in load_manifest(folder / "out").shards] == [2, 101, 4]

    def test_a_mask_travels_with_its_shard(self, tmp_path: Path) -> None:
        tokens = documents(20)
        scored = np.random.default_rng(0).random(tokens.size) < 0.5
        (tmp_path / "ours").mkdir()
        writer = ShardWriter(tmp_path / "ours", "train_000000.npy", "train")
        writer.append(tokens, documents=20, utf8_bytes=5, scored=scored)
        manifest = Manifest(gpt2_tokenizer_record(), SourceRecord("text", {}), {}, (writer.close(),))
        write_json_durably(tmp_path / "ours" / "manifest.json", manifest.to_json())
        convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "arrow", to="arrow"))
        verify(tmp_path / "arrow")
        stream = open_split(tmp_path / "arrow", "train")
        assert stream.read_mask_windows(np.array([0]), tokens.size)[0].tolist() == scored.tolist()
        assert stream.utf8_bytes == 5
        for to in ("nanogpt", "llmc"):
            with pytest.raises(DataError, match="train_000000.mask.npy says which tokens are scored.*would be lost"):
                convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / to, to=to))
            assert not (tmp_path / to).exists()


class TestForeignFiles:
    def test_nanogpt_reads_what_is_exported(self, tmp_path: Path) -> None:
        train, val = documents(30), documents(4, 1)
        write_ours(tmp_path / "ours", {"train": [train[:100], train[100:]], "val": [val]})
        convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "out", to="nanogpt"))
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.bin", "val.bin"]
        # The line of nanoGPT's train.py.
        assert np.memmap(tmp_path / "out" / "train.bin", dtype=np.uint16, mode="r").tolist() == train.tolist()

    def test_llmc_reads_what_is_exported(self, tmp_path: Path) -> None:
        train, val = documents(60), documents(4, 1)
        write_ours(tmp_path / "ours", {"train": [train], "val": [val]})
        request = ConvertRequest(
            source=tmp_path / "ours", out=tmp_path / "out", to="llmc", name="fineweb", shard_tokens=400
        )
        convert(request)
        files = sorted(path.name for path in (tmp_path / "out").glob("*.bin"))
        assert files[0] == "fineweb_train_000001.bin" and files[-1] == "fineweb_val_000000.bin"
        read = []
        for path in sorted((tmp_path / "out").glob("fineweb_train_*.bin")):
            # As modded-nanogpt's _load_data_shard does.
            header = np.fromfile(path, dtype=np.int32, count=256)
            assert (header[0], header[1]) == (LLMC_MAGIC, LLMC_VERSION) and not header[3:].any()
            tokens = np.fromfile(path, dtype=np.uint16, offset=1024)
            assert header[2] == tokens.size
            read.append(tokens)
        assert [tokens.size for tokens in read[:-1]] == [400] * (len(read) - 1)
        np.testing.assert_array_equal(np.concatenate(read), train)

    def test_without_validation_llmcs_numbers_begin_at_1(self, tmp_path: Path) -> None:
        write_ours(tmp_path / "ours", {"train": [documents(60)]})
        convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "out", to="llmc"))
        assert [path.name for path in (tmp_path / "out").glob("*.bin")] == ["out_train_000001.bin"]

    def test_nanogpts_separator_stays_behind_each_document(self, tmp_path: Path) -> None:
        np.array([1, 2, END, 3, END], dtype="<u2").tofile(tmp_path / "train.bin")
        np.array([4, END], dtype="<u2").tofile(tmp_path / "val.bin")
        convert(ConvertRequest(source=tmp_path, out=tmp_path / "out", to="npy"))
        assert totals(tmp_path / "out") == {
            "train": ([1, 2, END, 3, END], 2, utf8_bytes_of([1, 2, 3])),
            "val": ([4, END], 1, utf8_bytes_of([4])),
        }
        manifest = load_manifest(tmp_path / "out")
        assert manifest.tokenizer == gpt2_tokenizer_record()
        assert (manifest.source.kind, manifest.source.options["files"], manifest.source.options["bytes"]) == (
            "nanogpt",
            2,
            14,
        )

    def test_bytes_of_text_are_those_of_the_vocabulary(self, tmp_path: Path) -> None:
        """Every id once: what import counts is what decoding gives."""
        tokens = np.arange(END + 1, dtype=np.uint16)
        write_llmc(tmp_path / "x_train_000001.bin", tokens)
        manifest = adopt_in_place(tmp_path)
        assert manifest.shards[0].utf8_bytes == utf8_bytes_of(tokens)

    def test_splits_are_told_by_names(self, tmp_path: Path) -> None:
        names = {
            "fineweb_train_000002.bin": 3,
            "fineweb_train_000001.bin": 2,
            "fineweb_val_000000.bin": 1,
            "tiny_shakespeare_val.bin": 4,
            "train-and-others_TEST.bin": 5,
        }
        for name, token in names.items():
            write_llmc(tmp_path / name, [token])
        splits = open_collection(tmp_path).splits
        found = {name: split.stream.read(0, split.stream.tokens).tolist() for name, split in splits.items()}
        assert found == {"train": [2, 3], "test": [5], "val": [1, 4]}

    def test_a_name_that_tells_nothing_needs_split_of(self, tmp_path: Path) -> None:
        for name in ("a.bin", "b.bin"):
            write_llmc(tmp_path / name, [1])
        with pytest.raises(DataError, match=r"a\.bin: its name does not tell its split; add --split-of a\.bin=train"):
            open_collection(tmp_path)
        collection = open_collection(tmp_path, split_of={"a.bin": "val", "b": "train"})
        assert [file.path.name for file in collection.splits["val"].files] == ["a.bin"]
        with pytest.raises(DataError, match=r"--split-of c\.bin=val: this file does not exist; .* a\.bin, b\.bin"):
            open_collection(tmp_path, split_of={"c.bin": "val"})
        with pytest.raises(DataError, match=r"--split-of a\.bin=\.\./x: '\.\./x' is not a name for a split"):
            open_collection(tmp_path, split_of={"a.bin": "../x"})
        assert list(open_collection(tmp_path / "a.bin").splits) == ["train"]

    def test_nanogpts_characters_are_not_taken_for_gpt2(self, tmp_path: Path) -> None:
        np.array([1, 2], dtype="<u2").tofile(tmp_path / "train.bin")
        (tmp_path / "meta.pkl").write_bytes(b"a pickle that nobody opens")
        with pytest.raises(DataError, match="meta.pkl says that the ids are of a vocabulary of their own"):
            open_collection(tmp_path)

    def test_raw_tokens_are_taken_for_nanogpts_by_name_only(self, tmp_path: Path) -> None:
        np.array([1, 2], dtype="<u2").tofile(tmp_path / "tokens.bin")
        with pytest.raises(DataError, match=r"--from says what it is \(native, nanogpt, llmc, megatron\)"):
            open_collection(tmp_path / "tokens.bin")
        assert open_collection(tmp_path / "tokens.bin", "nanogpt").splits["train"].stream.tokens == 2

    def test_ids_of_another_vocabulary_keep_their_shards(self, byte_corpus: Path, tmp_path: Path) -> None:
        convert(ConvertRequest(source=byte_corpus, out=tmp_path / "arrow", to="arrow"))
        assert totals(tmp_path / "arrow") == totals(byte_corpus)
        assert load_manifest(tmp_path / "arrow").tokenizer == load_manifest(byte_corpus).tokenizer
        with pytest.raises(DataError, match="is of the tokenizer 'bytes'.*--to npy or arrow without --shard-tokens"):
            convert(ConvertRequest(source=byte_corpus, out=tmp_path / "llmc", to="llmc"))


megatron_documents = st.lists(st.lists(st.lists(token_ids, max_size=6), max_size=3), max_size=12)


class TestMegatron:
    @few_examples
    @given(
        corpus=megatron_documents,
        append_eod=st.booleans(),
        wide=st.booleans(),
        reads=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=6),
    )
    def test_each_document_follows_an_end_of_text(
        self, corpus: list[list[list[int]]], append_eod: bool, wide: bool, reads: list[tuple[int, int]]
    ) -> None:
        expected: list[int] = []
        for document in corpus:
            text = [token for sequence in document for token in sequence]
            if append_eod and document:
                text.append(END)
            expected += [END, *(text[:-1] if text[-1:] == [END] else text)]
        with small_pieces() as folder:
            dtype, code = ("<i4", 4) if wide else ("<u2", 8)
            write_megatron(folder / "my_text_document", corpus, dtype, code, append_eod)
            stream = open_collection(folder / "my_text_document").splits["train"].stream
            assert stream.read(0, stream.tokens).tolist() == expected
            for start, stop in reads:
                start, stop = sorted((min(start, len(expected)), min(stop, len(expected))))
                assert stream.read(start, stop - start).tolist() == expected[start:stop]
            convert(
                ConvertRequest(source=folder / "my_text_document.bin", out=folder / "out", to="arrow", shard_tokens=20)
            )
            assert totals(folder / "out") == {"train": (expected, expected.count(END), utf8_bytes_of(expected))}

    def test_pairs_of_a_folder_are_put_end_to_end(self, tmp_path: Path) -> None:
        write_megatron(tmp_path / "b_train", [[[1, 2]]])
        write_megatron(tmp_path / "a_train", [[[3], [4]]], append_eod=True)
        write_megatron(tmp_path / "valid", [[[5]]])
        splits = open_collection(tmp_path).splits
        found = {name: split.stream.read(0, split.stream.tokens).tolist() for name, split in splits.items()}
        assert found == {"train": [END, 3, 4, END, 1, 2], "val": [END, 5]}


Damage = Callable[[Path], None]


def edit(name: str, change: Callable[[bytearray], object]) -> Damage:
    """Change the bytes of a file; what ``change`` returns, if anything, replaces them."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        changed = change(content)
        (folder / name).write_bytes(changed if isinstance(changed, (bytes, bytearray)) else content)

    return damage


def put(name: str, offset: int, layout: str, value: int) -> Damage:
    return edit(name, lambda content: struct.pack_into(layout, content, offset, value))


def cut(name: str, count: int) -> Damage:
    return edit(name, lambda content: content[:-count])


def grow(name: str, extra: bytes) -> Damage:
    return edit(name, lambda content: content + extra)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def replace_by_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


# Offsets in an index of 3 sequences and 3 boundaries: sizes from 34 on, pointers from 46, boundaries from 70.
DAMAGE: list[tuple[str, str, Damage, str]] = [
    (
        "nanogpt",
        "odd_size",
        cut("train.bin", 1),
        r"train\.bin is not a whole file of uint16 tokens.*odd number of bytes",
    ),
    ("nanogpt", "id", put("train.bin", 4, "<H", 50257), r"train\.bin holds token 50257, the vocabulary ends at 50256"),
    ("nanogpt", "id_of_val", put("val.bin", 2, "<H", 65535), r"val\.bin holds token 65535, the vocabulary ends"),
    ("nanogpt", "folder", replace_by_folder("train.bin"), r"cannot read \S*train\.bin: Is a directory"),
    ("nanogpt", "empty_folder", empty, "no file ends in"),
    ("llmc", "cut", cut("x_train_000001.bin", 2), r"x_train_000001\.bin.*header says 100 tokens, its size says 99"),
    (
        "llmc",
        "odd_size",
        cut("x_train_000001.bin", 1),
        r"x_train_000001\.bin.*header says 100 tokens, its size says 99\.5",
    ),
    ("llmc", "grown", grow("x_train_000001.bin", b"\0\0"), r"header says 100 tokens, its size says 101"),
    ("llmc", "count", put("x_train_000001.bin", 8, "<i", 101), r"header says 101 tokens, its size says 100"),
    ("llmc", "negative", put("x_train_000001.bin", 8, "<i", -1), r"header says -1 tokens, its size says 100"),
    ("llmc", "magic", put("x_val_000000.bin", 0, "<i", 20240801), r"x_val_000000\.bin.*magic is 20240801.*is 20240520"),
    ("llmc", "version", put("x_val_000000.bin", 4, "<i", 7), r"x_val_000000\.bin.*its version is 7, it must be 1"),
    ("llmc", "header", edit("x_val_000000.bin", lambda content: content[:1000]), "ends after 1000 bytes.*its header"),
    ("llmc", "empty", edit("x_val_000000.bin", lambda content: b""), r"x_val_000000\.bin.*ends after 0 bytes"),
    ("llmc", "id", put("x_val_000000.bin", 1030, "<H", 60000), r"x_val_000000\.bin holds token 60000"),
    ("llmc", "folder", replace_by_folder("x_val_000000.bin"), r"cannot read \S*x_val_000000\.bin: Is a directory"),
    ("megatron", "no_tokens", remove("x.bin"), r"cannot read \S*x\.bin: No such file"),
    ("megatron", "no_index", remove("x.idx"), r"no file ends in \.idx"),
    (
        "megatron",
        "header",
        edit("x.idx", lambda content: content[:33]),
        r"x\.idx is not a whole index: it ends after 33 bytes",
    ),
    (
        "megatron",
        "cut",
        cut("x.idx", 8),
        r"x\.idx is not a whole index: 3 sequences and 3 document boundaries take 94 bytes",
    ),
    ("megatron", "grown", grow("x.idx", b"\0\0\0"), r"x\.idx is not a whole index.*take 94 bytes, it has 97"),
    (
        "megatron",
        "counts",
        put("x.idx", 18, "<Q", 1 << 62),
        r"x\.idx is not a whole index: 4611686018427387904 sequences",
    ),
    ("megatron", "magic", put("x.idx", 0, "<B", 0), r"x\.idx is not an index of Megatron: its magic is"),
    (
        "megatron",
        "older",
        edit("x.idx", lambda content: b"TNTIDX\0\0" + content),
        r"x\.idx is an index of the older kind",
    ),
    ("megatron", "version", put("x.idx", 9, "<Q", 2), r"x\.idx: its version is 2, it must be 1"),
    (
        "megatron",
        "float",
        put("x.idx", 17, "<B", 6),
        r"x\.idx: its tokens are of type 6 \(floating point\), they must be",
    ),
    ("megatron", "double", put("x.idx", 17, "<B", 7), r"x\.idx: its tokens are of type 7 \(floating point\)"),
    ("megatron", "int64", put("x.idx", 17, "<B", 5), r"x\.idx: its tokens are of type 5 \(int64\)"),
    ("megatron", "dtype", put("x.idx", 17, "<B", 99), r"x\.idx: its tokens are of type 99 \(unknown\)"),
    ("megatron", "wider", put("x.idx", 17, "<B", 4), r"x\.idx: sequence 1 is said to begin at byte 4"),
    ("megatron", "size", put("x.idx", 38, "<i", -3), r"x\.idx: sequence 1 has the size -3, it must be 0 or more"),
    (
        "megatron",
        "pointer",
        put("x.idx", 62, "<q", 1 << 40),
        r"x\.idx: sequence 2 is said to begin at byte 1099511627776",
    ),
    ("megatron", "last_size", put("x.idx", 42, "<i", 9), r"x\.bin has 12 bytes, its index accounts for 24"),
    ("megatron", "text_cut", cut("x.bin", 2), r"x\.bin has 10 bytes, its index accounts for 12 \(6 tokens of uint16\)"),
    ("megatron", "text_grown", grow("x.bin", b"\0"), r"x\.bin has 13 bytes, its index accounts for 12"),
    (
        "megatron",
        "first",
        put("x.idx", 70, "<q", 1),
        r"x\.idx: its document boundaries must go from 0 to 3, they are from 1",
    ),
    ("megatron", "last", put("x.idx", 86, "<q", 2), r"document boundaries must go from 0 to 3, they are from 0 to 2"),
    ("megatron", "backwards", put("x.idx", 78, "<q", 9), r"x\.idx: document 1 ends before it begins"),
    ("megatron", "id", put("x.bin", 4, "<H", 50257), r"x\.bin holds token 50257, the vocabulary ends at 50256"),
]


def write_sound(folder: Path, format: str) -> None:
    folder.mkdir()
    if format == "nanogpt":
        np.arange(50, dtype="<u2").tofile(folder / "train.bin")
        np.arange(9, dtype="<u2").tofile(folder / "val.bin")
    elif format == "llmc":
        write_llmc(folder / "x_train_000001.bin", range(100))
        write_llmc(folder / "x_val_000000.bin", range(9))
    else:
        write_megatron(folder / "x", [[[1, 2], [3]], [[4, 5, 6]]])


@pytest.mark.parametrize(("format", "name", "damage", "message"), DAMAGE, ids=[f"{it[0]}-{it[1]}" for it in DAMAGE])
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, format: str, name: str, damage: Damage, message: str
) -> None:
    source = tmp_path / "source"
    write_sound(source, format)
    convert(ConvertRequest(source=source, source_format=format, out=tmp_path / "sound", to="npy"))
    damage(source)
    with pytest.raises(DataError, match=message) as caught:
        convert(ConvertRequest(source=source, source_format=format, out=tmp_path / "out", to="npy"))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sound", "source"]


def test_a_wide_token_is_not_wrapped_into_the_vocabulary(tmp_path: Path) -> None:
    write_megatron(tmp_path / "x", [[[1, 65536 + 7]]], "<i4", 4)
    for damage in (65536 + 7, -1):
        put("x.bin", 4, "<i", damage)(tmp_path)
        with pytest.raises(DataError, match=rf"x\.bin holds token {damage}, the vocabulary ends at 50256"):
            convert(ConvertRequest(source=tmp_path / "x", out=tmp_path / "out", to="npy"))


class TestInPlace:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Shards of llm.c, whose documents run across their ends, and the same tokens as npy in ``ours``."""
        train, val = documents(200), documents(20, 1)
        write_ours(tmp_path / "ours", {"train": [train], "val": [val]})
        (tmp_path / "llmc").mkdir()
        for index, piece in enumerate(np.array_split(train, 5)):
            write_llmc(tmp_path / "llmc" / f"fineweb_train_{index + 1:06d}.bin", piece)
        write_llmc(tmp_path / "llmc" / "fineweb_val_000000.bin", val)
        return tmp_path / "llmc"

    def test_training_reads_what_it_reads_from_npy(self, folder: Path) -> None:
        before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
        adopt_in_place(folder)
        assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.bin")} == before
        ours = folder.parent / "ours"
        assert totals(folder) == totals(ours)
        for split in ("train", "val"):
            here, there = open_split(folder, split), open_split(ours, split)
            assert (here.tokens, here.documents, here.utf8_bytes) == (there.tokens, there.documents, there.utf8_bytes)
            starts = np.random.default_rng(0).integers(0, here.tokens - 64, 50)
            np.testing.assert_array_equal(here.read_windows(starts, 65), there.read_windows(starts, 65))
        verify(folder)

    def test_the_manifest_is_the_same_wherever_the_folder_stands(self, folder: Path) -> None:
        moved = folder.rename(folder.parent / "moved")
        first = adopt_in_place(moved)
        (moved / "manifest.json").unlink()
        assert adopt_in_place(moved.rename(folder)).content_sha256() == first.content_sha256()

    def test_a_shard_that_changes_later_is_noticed(self, folder: Path) -> None:
        adopt_in_place(folder)
        put("fineweb_train_000002.bin", 1200, "<H", 5)(folder)
        with pytest.raises(DataError, match=r"fineweb_train_000002\.bin: its SHA-256 is not the one in manifest"):
            verify(folder)
        cut("fineweb_train_000003.bin", 2)(folder)
        with pytest.raises(DataError, match=r"fineweb_train_000003\.bin is not a whole shard.*its header says"):
            open_split(folder, "train")

    def test_a_damaged_shard_leaves_no_manifest(self, folder: Path) -> None:
        put("fineweb_train_000002.bin", 1200, "<H", 60000)(folder)
        with pytest.raises(DataError, match=r"fineweb_train_000002\.bin holds token 60000"):
            adopt_in_place(folder)
        assert not [path for path in folder.iterdir() if path.suffix != ".bin"]

    def test_only_llmcs_folders_without_a_manifest(self, folder: Path) -> None:
        adopt_in_place(folder)
        with pytest.raises(DataError, match=r"already has a manifest\.json"):
            adopt_in_place(folder)
        with pytest.raises(DataError, match="is not a folder"):
            adopt_in_place(folder / "fineweb_val_000000.bin")
        write_sound(folder / "other", "nanogpt")
        with pytest.raises(DataError, match="are in the format nanogpt; only llm.c's can stay in place"):
            adopt_in_place(folder / "other")


class TestNothingHalfWritten:
    @pytest.fixture
    def ours(self, tmp_path: Path) -> Path:
        write_ours(tmp_path / "ours", {"train": [documents(100), documents(50, 1)], "val": [documents(10, 2)]})
        return tmp_path / "ours"

    @pytest.mark.parametrize("to", ["npy", "arrow", "nanogpt", "llmc"])
    def test_an_error_leaves_nothing(self, ours: Path, to: str) -> None:
        class InterruptedError(Exception):
            pass

        def interrupt(done_bytes: int) -> None:
            if done_bytes:
                raise InterruptedError

        before = sorted(ours.parent.iterdir())
        with pytest.raises(InterruptedError):
            convert(ConvertRequest(source=ours, out=ours.parent / "out", to=to), written=interrupt)
        assert sorted(ours.parent.iterdir()) == before

    @pytest.mark.parametrize("to", ["npy", "nanogpt"])
    def test_after_a_kill_nothing_is_in_the_way(self, ours: Path, to: str) -> None:
        out = ours.parent / "out"
        script = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from data_tools.formats import ConvertRequest, convert\n"
            "request = ConvertRequest(source=Path(sys.argv[1]), out=Path(sys.argv[2]), to=sys.argv[3], workers=1)\n"
            "convert(request, written=lambda done_bytes: done_bytes and os.kill(os.getpid(), signal.SIGKILL))\n"
        )
        killed = subprocess.run(
            [sys.executable, "-c", script, ours, out, to], env=environment(), check=False, timeout=60
        )
        assert killed.returncode == -signal.SIGKILL
        assert not out.exists()
        assert len(list(ours.parent.iterdir())) == 2, "what the killed one left is what this test is about"
        convert(ConvertRequest(source=ours, out=out, to="llmc", shard_tokens=10_000))
        assert sorted(path.name for path in ours.parent.iterdir()) == ["ours", "out"]
        assert sorted(path.name for path in out.iterdir()) == [
            "manifest.json",
            "out_train_000001.bin",
            "out_val_000000.bin",
        ]
        assert open_collection(out).splits["train"].stream.tokens == documents(100).size + documents(50, 1).size

    def test_an_empty_folder_is_filled_and_another_is_left_alone(self, ours: Path) -> None:
        out = ours.parent / "out"
        out.mkdir()
        convert(ConvertRequest(source=ours, out=out, to="arrow"))
        verify(out)
        before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        with pytest.raises(DataError, match=r"--out \S*out is not empty \(it holds manifest\.json\)"):
            convert(ConvertRequest(source=ours, out=out, to="npy"))
        with pytest.raises(DataError, match=r"--out \S*manifest\.json is a file"):
            convert(ConvertRequest(source=ours, out=out / "manifest.json", to="npy"))
        assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before

    def test_a_damaged_folder_of_ours_is_not_given_new_hashes(self, ours: Path) -> None:
        put("train_000001.npy", 300, "<H", 7)(ours)
        with pytest.raises(DataError, match=r"train_000001\.npy: its SHA-256"):
            convert(ConvertRequest(source=ours, out=ours.parent / "out", to="arrow"))
        assert not (ours.parent / "out").exists()


class TestVerify:
    @pytest.mark.parametrize("workers", [1, 2, 7])
    def test_any_number_of_threads(self, tmp_path: Path, workers: int) -> None:
        shards = [documents(20, seed) for seed in range(5)]
        manifest = write_ours(tmp_path / "ours", {"train": shards})
        told: list[int] = []
        assert verify(tmp_path / "ours", workers, told.append) == manifest
        assert sum(told) == sum((tmp_path / "ours" / shard.file).stat().st_size for shard in manifest.shards)
        for name in ("train_000001.npy", "train_000003.npy"):
            put(name, 200, "<H", 7)(tmp_path / "ours")
        with pytest.raises(DataError, match=r"train_000001\.npy: its SHA-256"):
            verify(tmp_path / "ours", workers)

    def test_bytes_of_text_are_counted_again(self, tmp_path: Path) -> None:
        write_ours(tmp_path / "ours", {"train": [documents(20)]})
        path = tmp_path / "ours" / "manifest.json"
        value = json.loads(path.read_text())
        del value["sha256"]
        value["shards"][0]["utf8_bytes"] += 1
        path.write_text(json.dumps(value))
        with pytest.raises(DataError, match=r"train_000000\.npy holds \d+ bytes of text, manifest\.json says"):
            verify(tmp_path / "ours")


class TestPreview:
    @staticmethod
    def previews(folder: Path, *, documents: int = 9, characters: int = 99) -> list[tuple[int, str, bool]]:
        found = first_documents(open_collection(folder), "train", documents=documents, characters=characters)
        return [(document.tokens, document.text, document.is_cut) for document in found]

    @pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
    def test_documents_wherever_the_separator_stands(self, behind: bool) -> None:
        texts = ["Hello world", "x", "The quick brown fox jumps over the lazy dog. " * 5]
        encoded = [load_tokenizer().encode(text) for text in texts]
        parts = [part for tokens in encoded for part in ([*tokens, END] if behind else [END, *tokens])]
        with small_pieces() as folder:
            np.array(parts, dtype="<u2").tofile(folder / "train.bin")
            sizes = [tokens.size for tokens in encoded]
            assert self.previews(folder, characters=999) == [(n, it, False) for n, it in zip(sizes, texts, strict=True)]
            assert self.previews(folder, documents=2, characters=5) == [(sizes[0], "Hello", True), (1, "x", False)]
            assert self.previews(folder, characters=30)[2] == (sizes[2], texts[2][:30], True)

    def test_an_empty_document_is_one(self, tmp_path: Path) -> None:
        np.array([END, 15496, END, END, 995], dtype="<u2").tofile(tmp_path / "train.bin")
        assert self.previews(tmp_path) == [(1, "Hello", False), (0, "", False), (1, " world", False)]

    def test_what_cannot_be_decoded(self, byte_corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is of the tokenizer 'bytes'; only gpt2 can be decoded"):
            self.previews(byte_corpus)
        np.array([1], dtype="<u2").tofile(tmp_path / "val.bin")
        with pytest.raises(DataError, match="has no split 'train'; it has val"):
            self.previews(tmp_path)


class TestInspect:
    def test_a_folder_of_ours(self, tmp_path: Path) -> None:
        manifest = write_ours(tmp_path / "ours", {"train": [documents(20), documents(5, 1)], "val": [documents(3, 2)]})
        report = inspect(tmp_path / "ours")
        train = report.splits["train"]
        first, second, _ = manifest.shards
        assert (report.format, report.problem, list(report.splits)) == ("native", None, ["train", "val"])
        assert (train.shards, train.documents, train.tokens) == (2, 25, first.tokens + second.tokens)
        assert (train.largest_shard_tokens, train.smallest_shard_tokens) == (first.tokens, second.tokens)
        assert train.bytes_per_token == pytest.approx((first.utf8_bytes + second.utf8_bytes) / train.tokens)
        assert f"{train.tokens:,}" in str(report) and "inputs" in str(report)
        assert json.loads(json.dumps(report.to_json()))["splits"]["train"]["documents"] == 25

    def test_a_damaged_one_is_shown_all_the_same(self, tmp_path: Path) -> None:
        write_ours(tmp_path / "ours", {"train": [documents(20)]})
        cut("train_000000.npy", 2)(tmp_path / "ours")
        report = inspect(tmp_path / "ours")
        assert "train_000000.npy is not a whole shard" in (report.problem or "")
        assert str(report.problem) in str(report) and report.splits["train"].documents == 20

    @pytest.mark.parametrize("format", ["nanogpt", "llmc", "megatron"])
    def test_foreign_files_are_recognised(self, tmp_path: Path, format: str) -> None:
        write_sound(tmp_path / "source", format)
        report = inspect(tmp_path / "source")
        assert report.format == format
        train = report.splits["train"]
        assert (train.tokens, train.documents, train.utf8_bytes) == (
            {"nanogpt": 50, "llmc": 100, "megatron": 8}[format],
            None,
            None,
        )
        assert f"format {format}" in str(report) and "gpt2 is assumed" in str(report)

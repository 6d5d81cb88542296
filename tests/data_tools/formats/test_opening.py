"""Formats and splits are recognized, and damaged files are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.formats.conversion import convert
from data_tools.formats.opening import open_collection
from data_tools.formats.plan import ConvertRequest
from tests.support.token_files import (
    Damage,
    cut,
    edit,
    put,
    write_llmc,
    write_megatron,
    write_sound,
)


class TestRecognition:
    def test_splits_are_recognized_by_file_names(self, tmp_path: Path) -> None:
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

    def test_a_name_without_a_split_needs_split_of(self, tmp_path: Path) -> None:
        for name in ("a.bin", "b.bin"):
            write_llmc(tmp_path / name, [1])
        with pytest.raises(DataError, match=r"a\.bin: its name does not tell its split; add --split-of a\.bin=train"):
            open_collection(tmp_path)
        collection = open_collection(tmp_path, split_of={"a.bin": "val", "b": "train"})
        assert [file.name for file in collection.splits["val"].tokens_of_file] == ["a.bin"]
        with pytest.raises(DataError, match=r"--split-of c\.bin=val: this file does not exist; .* a\.bin, b\.bin"):
            open_collection(tmp_path, split_of={"c.bin": "val"})
        with pytest.raises(DataError, match=r"--split-of a\.bin=\.\./x: '\.\./x' is not a name for a split"):
            open_collection(tmp_path, split_of={"a.bin": "../x"})
        assert list(open_collection(tmp_path / "a.bin").splits) == ["train"]

    def test_nanogpts_character_vocabulary_is_refused(self, tmp_path: Path) -> None:
        np.array([1, 2], dtype="<u2").tofile(tmp_path / "train.bin")
        (tmp_path / "meta.pkl").write_bytes(b"a pickle that nobody opens")
        with pytest.raises(DataError, match="meta.pkl says that the ids are of a vocabulary of their own"):
            open_collection(tmp_path)

    def test_bare_tokens_are_recognized_by_name_only(self, tmp_path: Path) -> None:
        np.array([1, 2], dtype="<u2").tofile(tmp_path / "tokens.bin")
        with pytest.raises(DataError, match=r"--from says what it is \(native, nanogpt, llmc, megatron, npy\)"):
            open_collection(tmp_path / "tokens.bin")
        assert open_collection(tmp_path / "tokens.bin", "nanogpt").splits["train"].stream.tokens == 2


def grow(name: str, extra: bytes) -> Damage:
    return edit(name, lambda content: content + extra)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def replace_by_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def save(name: str, values: np.ndarray) -> Damage:
    return lambda folder: np.save(folder / name, values)


def write_pair(sequences: list[list[list[int]]]) -> Damage:
    return lambda folder: write_megatron(folder / "x", sequences)


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
    (
        "nanogpt",
        "wider",
        edit("val.bin", lambda content: np.arange(20, dtype="<u4").tobytes()),
        r"val\.bin holds 32-bit tokens.*write the tokens again as np\.uint16",
    ),
    ("nanogpt", "folder", replace_by_folder("train.bin"), r"cannot read \S*train\.bin: Is a directory"),
    ("nanogpt", "empty_folder", empty, "no file ends in"),
    ("nanogpt", "empty", edit("train.bin", lambda content: b""), r"train\.bin has no tokens \(0 bytes\)"),
    ("nanogpt", "empty_val", edit("val.bin", lambda content: b""), r"val\.bin has no tokens \(0 bytes\)"),
    (
        "llmc",
        "header_only",
        edit("x_train_000001.bin", lambda content: content[:8] + bytes(1016)),
        r"x_train_000001\.bin has no tokens \(1024 bytes\)",
    ),
    ("npy", "cut", cut("edufineweb_train_000001.npy", 2), r"train_000001\.npy is not a whole array.*it is cut short"),
    ("npy", "grown", grow("edufineweb_train_000001.npy", b"\0\0"), "it has bytes after its tokens"),
    ("npy", "id", put("edufineweb_train_000001.npy", 130, "<H", 50257), r"train_000001\.npy holds token 50257"),
    ("npy", "empty", edit("edufineweb_val_000000.npy", lambda content: b""), r"val_000000\.npy is empty \(0 bytes\)"),
    ("npy", "no_tokens", save("edufineweb_val_000000.npy", np.empty(0, np.uint16)), r"has no tokens \(128 bytes\)"),
    (
        "npy",
        "wider",
        save("edufineweb_val_000000.npy", np.arange(9)),
        r"its header says <i8 of shape \(9,\), expected <u2",
    ),
    (
        "npy",
        "two_rows",
        save("edufineweb_val_000000.npy", np.zeros((2, 3), np.uint16)),
        r"of shape \(2, 3\)",
    ),
    ("npy", "header", put("edufineweb_val_000000.npy", 20, "<B", 0), r"val_000000\.npy.*its header is damaged"),
    ("megatron", "no_documents", write_pair([]), r"x\.bin has no tokens \(0 bytes\)"),
    ("megatron", "no_text", write_pair([[], [[]]]), r"x\.bin has no tokens \(0 bytes\)"),
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
    ("llmc", "magic", put("x_val_000000.bin", 0, "<i", 20240521), r"x_val_000000\.bin.*magic is 20240521.*is 20240520"),
    ("llmc", "wide", put("x_val_000000.bin", 0, "<i", 20240801), r"x_val_000000\.bin.* contains tokens of 32 bits"),
    ("llmc", "version", put("x_val_000000.bin", 4, "<i", 7), r"x_val_000000\.bin.*its version is 7, it must be 1"),
    ("llmc", "header", edit("x_val_000000.bin", lambda content: content[:1000]), "ends after 1000 bytes.*its header"),
    ("llmc", "empty", edit("x_val_000000.bin", lambda content: b""), r"x_val_000000\.bin is empty \(0 bytes\)"),
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


def test_a_file_of_llmc_without_uint16_tokens_is_recognized_and_refused(tmp_path: Path) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240801, 7, 4
    (tmp_path / "x_train.bin").write_bytes(header.tobytes() + np.arange(4, dtype="<u4").tobytes())
    with pytest.raises(
        DataError, match=r"x_train\.bin .*contains tokens of 32 bits, as for Llama 3 \(magic 20240801\)"
    ):
        open_collection(tmp_path)

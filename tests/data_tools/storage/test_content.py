"""Files that hold something else than their name says are recognized, and every reader says what they are."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_tools.errors import DataError, UserError
from data_tools.formats.conversion import convert
from data_tools.formats.opening import open_collection
from data_tools.formats.plan import ConvertRequest
from data_tools.shards.manifest import load_manifest
from data_tools.shards.reader import open_split
from data_tools.sources import SourceRequest, open_source
from data_tools.storage.content import describe_content, describe_decoded, require_fetched
from pipeline.checkpoint.json_files import read_json_object
from pipeline.checkpoint.pieces import open_tensors
from pipeline.config.loading import load_config
from pipeline.evaluation.sources import read_file
from pipeline.interop.foreign import load_pickled_tensors
from tests.support.token_files import write_ours

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
TEXT = b'{"text": "A line of JSON."}\n' * 50


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


def arrow_stream_bytes() -> bytes:
    """Return an empty table in the format of ``save_to_disk``."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})):
        pass
    return sink.getvalue().to_pybytes()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(9, dtype=np.uint16))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (POINTER, "git-lfs pointer, not the file itself; fetch the file with: git lfs pull"),
        (gzip.compress(TEXT, mtime=0), "compressed by gzip"),
        (pa.Codec("zstd").compress(TEXT, asbytes=True), "compressed by zstd"),
        (b"PK\x03\x04....", "zip archive"),
        (pa.Codec("lz4").compress(TEXT, asbytes=True), "compressed by lz4; decompress it"),
        (b"\x1f\x9d\x90", "compressed by compress; decompress it"),
        (b"7z\xbc\xaf\x27\x1c", "7z archive"),
        (b"Rar!\x1a\x07\x01\x00", "rar archive"),
        (npy_bytes(), "array of numpy"),
        (b"", "is empty"),
        (bytes(600), "zeros only"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"\xef\xbb\xbf\n <HTML><body>", "HTML page"),
        (tar_bytes(), "tar archive; extract the files in it"),
        (arrow_stream_bytes(), "Arrow file; give its folder to --source hf"),
        ("text".encode("utf-16"), "text in UTF-16; save it as UTF-8"),
        ("text".encode("utf-16-le"), "text in UTF-16; save it as UTF-8"),
        ("text".encode("utf-16-be"), "text in UTF-16; save it as UTF-8"),
        (("Ein schöner Tag für größere Übungen. " * 9).encode("utf-16-le"), "text in UTF-16; save it as UTF-8"),
        ("text".encode("utf-32"), "text in UTF-32"),
        (b"%PDF-1.7", "is a PDF; extract its text"),
    ],
)
def test_content_is_recognized(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "file").write_bytes(content)
    assert expected in str(describe_content(tmp_path / "file"))


def test_nothing_is_said_of_other_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(TEXT)
    assert describe_content(tmp_path / "file") is None
    assert describe_content(tmp_path / "missing") is None
    assert describe_content("s3://bucket/file") is None
    (tmp_path / "file").write_bytes(np.array([11, 290, 13, 262, 198, 3290] * 40, np.uint16).tobytes())  # tokens
    assert describe_content(tmp_path / "file") is None
    (tmp_path / "file").write_bytes(gzip.compress(TEXT, mtime=0))
    assert describe_content(tmp_path / "file", "gzip") is None
    require_fetched(tmp_path / "file")


@pytest.mark.parametrize(
    "content",
    [
        tar_bytes(),
        "text".encode("utf-16-le"),
        "text".encode("utf-16-be"),
        ("A “quoted” word. " * 9).encode("utf-16-le"),
        ("Все счастливые семьи похожи друг на друга. " * 9).encode("utf-16-be"),
        bytes(600),
    ],
)
def test_bytes_that_are_valid_utf8_but_not_text(content: bytes) -> None:
    content.decode("utf-8")
    assert describe_decoded(content)


@pytest.mark.parametrize(
    "text", ["", "a", "\0", "a\0", "ab", "ustar", "<html>", "a\0b", "PAR1", "%PDF-", TEXT.decode(), "name\0file\0" * 50]
)
def test_short_and_odd_texts_are_texts(text: str) -> None:
    assert describe_decoded(text.encode()) is None


def read_source(source: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        opened = open_source(SourceRequest(source=source, inputs=(str(path),)))  # type: ignore[arg-type]
        return [document for source_slice in opened.slices(1 << 20) for document in opened.read(source_slice)]

    return read


#: How each reader is called with the path of the file, and the file's name.
READERS: list[tuple[str, Callable[[Path], object]]] = [
    ("a.txt", read_source("text")),
    ("a.txt.gz", read_source("text")),
    ("a.jsonl", read_source("jsonl")),
    ("a.jsonl.zst", read_source("jsonl")),
    ("a.json", read_source("instructions")),
    ("a.parquet", read_source("parquet")),
    ("a.csv", lambda path: read_source("hf")(path.parent)),
    ("train.bin", open_collection),
    ("a_train.npy", open_collection),
    ("tokens.bin", lambda path: open_collection(path, "llmc")),
    ("a.idx", lambda path: open_collection(path, "megatron")),
    ("manifest.json", lambda path: load_manifest(path.parent)),
    ("run.json", lambda path: load_config([path])),
    ("config.json", read_json_object),
    ("model.safetensors", lambda path: open_tensors(path).__enter__()),
    ("pytorch_model.bin", lambda path: load_pickled_tensors(path, "weights")),
    ("task.jsonl", read_file),
    ("task.parquet", read_file),
    ("book.txt", read_file),
]


@pytest.mark.parametrize(("name", "read"), READERS, ids=[f"{n}_{name}" for n, (name, _) in enumerate(READERS)])
def test_every_reader_names_a_pointer_and_the_cure(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert f"{name}" in str(caught.value) and "git lfs pull" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_a_pointer(tmp_path: Path) -> None:
    write_ours(tmp_path / "data", {"train": [np.arange(30, dtype=np.uint16)]})
    (tmp_path / "data" / "train_000000.npy").write_bytes(POINTER)
    with pytest.raises(DataError, match=r"train_000000\.npy is a git-lfs pointer"):
        open_split(tmp_path / "data", "train")


@pytest.mark.parametrize(
    ("source", "name", "content", "expected"),
    [
        ("text", "a.txt", gzip.compress(TEXT, mtime=0), "a.txt is compressed by gzip; decompress it, or let the name"),
        ("jsonl", "a.jsonl", gzip.compress(TEXT, mtime=0), "a.jsonl is compressed by gzip"),
        ("jsonl", "a.jsonl", pa.Codec("zstd").compress(TEXT, asbytes=True), "a.jsonl is compressed by zstd"),
        (
            "instructions",
            "a.json",
            gzip.compress(b'[{"instruction": "a", "output": "b"}]', mtime=0),
            "is compressed by gzip",
        ),
        ("text", "a.tgz", gzip.compress(tar_bytes(), mtime=0), "a.tgz is a tar archive; extract the files in it"),
        ("text", "a.tar.xz", lzma.compress(tar_bytes()), "a.tar.xz is a tar archive; extract the files in it"),
        ("text", "a.tar.gz", gzip.compress(tar_bytes(), mtime=0), "a.tar.gz is a tar archive; extract the files in it"),
        ("jsonl", "a.tbz2", bz2.compress(tar_bytes()), "a.tbz2 is a tar archive; extract the files in it"),
        ("jsonl", "a.jsonl.gz", TEXT, "it is not compressed by gzip, though its name says so; rename it"),
        ("jsonl", "a.jsonl.zst", TEXT, "it is not compressed by zstd, though its name says so; rename it"),
        ("jsonl", "a.jsonl.gz", b"", "a.jsonl.gz is empty (0 bytes)"),
        ("jsonl", "a.jsonl.gz", gzip.compress(TEXT, mtime=0)[:-1], "; if it is damaged, copy or download it again"),
        ("jsonl", "a.jsonl.gz", gzip.compress(TEXT, mtime=0)[:-9], "; if it is damaged, copy or download it again"),
        ("jsonl", "a.jsonl.gz", gzip.compress(TEXT, mtime=0) + b"more", "; if it is damaged, copy or download it"),
        ("parquet", "a.parquet", b"PAR1 and more", "; if it is damaged, copy or download it again"),
        ("jsonl", "a.jsonl", "{}".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        ("jsonl", "a.jsonl", b"<!DOCTYPE html>\n", "is an HTML page"),
        ("parquet", "a.parquet", gzip.compress(TEXT, mtime=0), "it is compressed by gzip"),
        ("parquet", "a.parquet", b"", "it is empty (0 bytes)"),
        ("text", "a.html", b"<html>caf\xe9</html>", "byte 9 (0xe9) is not valid UTF-8"),
    ],
)
def test_sources_name_what_a_file_holds(tmp_path: Path, source: str, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_source(source)(tmp_path / name)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("zeros", [1, 8, 512, 5000])
@pytest.mark.parametrize("content", [TEXT, TEXT * 2000, b'{"text": "x"}'])
def test_zeros_after_a_gzip_file_are_ignored(tmp_path: Path, content: bytes, zeros: int) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content, mtime=0))
    sound = read_source("jsonl")(path)
    path.write_bytes(gzip.compress(content, mtime=0) + bytes(zeros))
    assert read_source("jsonl")(path) == sound


def test_a_byte_order_mark_in_json_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b'\xef\xbb\xbf{"run": {"seed": 5}}')
    assert load_config([tmp_path / "run.json"]).run.seed == 5
    assert read_json_object(tmp_path / "run.json") == {"run": {"seed": 5}}
    (tmp_path / "task.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert read_file(tmp_path / "task.jsonl").rows == [{"text": "a"}]
    with pytest.raises(UserError, match=r"run\.json: is text in UTF-16; save it as UTF-8"):
        (tmp_path / "run.json").write_bytes('{"run": {"seed": 5}}'.encode("utf-16"))
        load_config([tmp_path / "run.json"])


def test_a_pointer_is_not_converted(tmp_path: Path) -> None:
    """A pointer of an even number of bytes would be a file of tokens in nanoGPT's format."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.bin").write_bytes(POINTER + b"\n" * (len(POINTER) % 2))
    with pytest.raises(DataError, match="git lfs pull"):
        convert(ConvertRequest(source=source, source_format="nanogpt", out=tmp_path / "out", to="npy"))
    assert not (tmp_path / "out").exists()

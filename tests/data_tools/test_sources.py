"""Each source yields exactly the documents that are there, in order, and names what it cannot read."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.errors import DataError
from data_tools.sources import SOURCE_KINDS, SourceRequest, open_source
from data_tools.sources import text as text_module
from tests.data_tools.conftest import varied_documents

DOCUMENTS = varied_documents(30)


def documents(source: str, *inputs: Path | str, **options: Any) -> list[str]:
    request = SourceRequest(source=source, inputs=tuple(map(str, inputs)), **options)
    return list(open_source(request).documents())


def refusal(source: str, *inputs: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        documents(source, *inputs, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(texts))


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


# Text


def test_a_file_is_a_document_byte_for_byte(tmp_path: Path) -> None:
    texts = ["a\r\nb\rc\n", "\ufeffwith a mark", "", "no newline at the end"]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_bytes(text.encode())
    assert documents("text", tmp_path) == texts


def test_folders_are_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ["b.txt", "a.md", "sub/c.txt", ".hidden", ".git/config", "B.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents("text", tmp_path) == ["B.txt", "a.md", "b.txt", "sub/c.txt"]
    assert documents("text", f"{tmp_path}/*.txt") == ["B.txt", "b.txt"]
    assert documents("text", f"{tmp_path}/**/*.txt") == ["B.txt", "b.txt", "sub/c.txt"]
    assert documents("text", tmp_path / "sub", tmp_path / "a.md") == ["sub/c.txt", "a.md"]


@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "§", "x"])
@pytest.mark.parametrize("read_bytes", [1, 3, 1 << 20])
def test_a_separator_divides_as_str_split_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, read_bytes: int
) -> None:
    monkeypatch.setattr(text_module, "_READ_BYTES", read_bytes)
    content = f"é{separator}{separator}b\n\n\nc<|endof|>{separator[:-1]}§漢x".join(["1", "2", "3"]) + separator
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert documents("text", tmp_path / "a.txt", document_separator=separator) == content.split(separator)


@pytest.mark.parametrize("separator", [None, "\n"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
def test_invalid_utf8_is_named_with_its_offset(
    tmp_path: Path, separator: str | None, compress: Callable[[bytes], bytes]
) -> None:
    suffix = {bytes: "", gzip.compress: ".gz", zstd: ".zst"}[compress]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress("é\nb\nc".encode() + b"\xff\nd"))
    assert f"{path}: byte 6 (0xff) is not valid UTF-8" in refusal("text", path, document_separator=separator)


# JSON Lines


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".jsonl", bytes),
        (".json", bytes),
        (".jsonl.gz", gzip.compress),
        (".json.gz", gzip.compress),
        (".jsonl.zst", zstd),
    ],
)
def test_json_lines_plain_and_compressed(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    # Several gzip members or zstd frames one after the other are one stream.
    content = compress(json_lines(DOCUMENTS[:10])) + compress(json_lines(DOCUMENTS[10:]))
    (tmp_path / f"a{suffix}").write_bytes(content)
    (tmp_path / "other.txt").write_text("no JSON")
    assert documents("jsonl", tmp_path) == DOCUMENTS
    assert documents("jsonl", tmp_path / f"a{suffix}") == DOCUMENTS


def test_a_compressed_file_longer_than_one_read(tmp_path: Path) -> None:
    texts = [f"{index} " * 10_000 for index in range(100)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(texts)))
    assert documents("jsonl", tmp_path) == texts


def test_blank_lines_a_mark_and_windows_newlines_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert documents("jsonl", tmp_path) == ["a", "b"]


def test_another_field_and_lone_surrogates(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "a\\ud800b", "text": 1}\n')
    assert documents("jsonl", tmp_path, text_field="body") == ["a\ud800b"]


BAD_LINES = {
    b'{"text": "b"': "a.jsonl:2: not valid JSON",
    b'["b"]': "a.jsonl:2: holds a list; each line must be one JSON object",
    b'"b"': "a.jsonl:2: holds a str",
    b'{"body": "b", "id": 1}': "a.jsonl:2: no field 'text'; the fields are body, id; choose one with --text-field",
    b"{}": "a.jsonl:2: no field 'text'; the fields are none",
    b'{"text": null}': "a.jsonl:2: field 'text' is a NoneType, it must be a string; the fields are text",
    b'{"text": ["b"], "id": 1}': "a.jsonl:2: field 'text' is a list, it must be a string; the fields are text, id",
    b'{"text": "\xff"}': "a.jsonl: byte 24 (0xff) is not valid UTF-8",
    b"[" * 100_000: "a.jsonl:2: not valid JSON",
    b"1" * 5000: "a.jsonl:2: ",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=lambda value: str(value)[:30])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    assert message in refusal("jsonl", tmp_path)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"x" * 50])
def test_a_damaged_compressed_file_is_named(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes], damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(damage(compress(json_lines(DOCUMENTS))))
    assert refusal("jsonl", path).startswith(f"cannot read {path}: ")


# Parquet


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_by_record_batch(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"{index} {DOCUMENTS[index % 30]}" for index in range(2000)]
    table = pa.table({"id": range(2000), "text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert documents("parquet", tmp_path) == texts


def test_parquet_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a", None], "id": [1, 2]}), path)
    assert f"{path}: no column 'text'; the columns are body, id; choose" in refusal("parquet", path)
    assert f"{path}: column 'id' holds int64, it must hold strings" in refusal("parquet", path, text_field="id")
    assert f"{path}: row 1: column 'body' is null" in refusal("parquet", path, text_field="body")
    path.write_bytes(b"PAR1 no parquet at all")
    assert refusal("parquet", path).startswith(f"cannot read {path}: ")


def test_invalid_utf8_in_parquet_is_named(tmp_path: Path) -> None:
    column = pa.array([b"fine", b"bad \xff"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "a.parquet: row 1: byte 4 of 'text' is not valid UTF-8" in refusal("parquet", tmp_path)


# Hugging Face datasets


@pytest.fixture
def hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("hub_offline")
def test_a_local_folder_of_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(json_lines(DOCUMENTS))
    (folder / "test.jsonl").write_bytes(json_lines(["held out"]))
    assert documents("hf", folder) == DOCUMENTS
    assert documents("hf", folder, dataset_split="test") == ["held out"]


@pytest.mark.usefixtures("hub_offline")
def test_a_local_folder_of_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    pq.write_table(pa.table({"body": DOCUMENTS}), folder / "train.parquet")
    assert documents("hf", folder, text_field="body") == DOCUMENTS


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": DOCUMENTS})
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "dev": dataset.select([3])}).save_to_disk(tmp_path / "many")
    assert documents("hf", tmp_path / "one") == DOCUMENTS
    assert documents("hf", tmp_path / "many") == DOCUMENTS
    assert documents("hf", tmp_path / "many", dataset_split="dev") == DOCUMENTS[3:4]
    assert "has no split 'val'; it has train, dev" in refusal("hf", tmp_path / "many", dataset_split="val")


@pytest.mark.usefixtures("hub_offline")
def test_dataset_faults_are_named(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.jsonl").write_bytes(b'{"body": "a"}\n')
    assert "row 0: no field 'text'; the fields are body" in refusal("hf", tmp_path / "dataset")
    assert "cannot read dataset nobody/nothing (config None, split train)" in refusal("hf", "nobody/nothing")
    message = refusal("hf", tmp_path / "dataset", dataset_split="nope", text_field="body")
    assert "split nope" in message


def test_fineweb_edu_is_the_streamed_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: object, **options: object) -> list[dict[str, str]]:
        calls.append((arguments, options))
        return [{"text": "a"}, {"text": "b"}]

    calls: list[object] = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents("fineweb-edu") == ["a", "b"]
    assert documents("fineweb-edu", dataset_config="sample-100BT") == ["a", "b"]
    streamed = {"split": "train", "streaming": True}
    assert calls == [
        (("HuggingFaceFW/fineweb-edu", "sample-10BT"), streamed),
        (("HuggingFaceFW/fineweb-edu", "sample-100BT"), streamed),
    ]


# The embedded corpus


def test_the_standard_library_is_millions_of_characters_of_distinct_text() -> None:
    texts = documents("python-stdlib")
    assert texts == documents("python-stdlib")
    assert sum(map(len, texts)) > 5_000_000
    assert len(set(texts)) == len(texts)
    with open(os.__file__, encoding="utf-8", newline="") as file:
        assert texts.count(file.read()) == 1
    topic = [text for text in texts if text.startswith('The "if" statement')]
    assert len(topic) == 1


def test_the_standard_library_holds_no_tests_and_no_packages() -> None:
    with open(json.__file__, encoding="utf-8", newline="") as file:
        assert file.read() in documents("python-stdlib")
    with open(pytest.__file__, encoding="utf-8", newline="") as file:
        assert file.read() not in documents("python-stdlib")


# What all have in common


@pytest.mark.parametrize("source", ["text", "hf"])
def test_options_change_when_a_file_grows(tmp_path: Path, source: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    request = SourceRequest(source=source, inputs=(str(tmp_path),))
    before = open_source(request).options()
    assert before == open_source(request).options() == json.loads(json.dumps(before))
    (tmp_path / "a.txt").write_text("ab")
    assert open_source(request).options() != before
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert open_source(request).options() != before


def test_an_unknown_kind_names_those_that_exist() -> None:
    assert ", ".join(SOURCE_KINDS) in refusal("csv")


@pytest.mark.parametrize(
    ("source", "inputs", "options", "message"),
    [
        ("text", [], {}, "--source text needs --input"),
        ("hf", [], {}, "--source hf needs --input"),
        ("hf", ["a", "b"], {}, "--source hf takes one --input, a dataset's name or folder, not 2"),
        ("python-stdlib", ["a"], {}, "--source python-stdlib takes no --input; text, jsonl, parquet, hf do"),
        ("fineweb-edu", ["a"], {}, "--source fineweb-edu takes no --input"),
        ("jsonl", ["a"], {"document_separator": "x"}, "takes no --document-separator; only text does"),
        ("text", ["a"], {"text_field": "body"}, "--source text takes no --text-field; jsonl, parquet, hf,"),
        ("text", ["a"], {"dataset_split": "dev"}, "takes no --dataset-split; hf, fineweb-edu do"),
        ("text", ["missing"], {}, "--input missing does not exist"),
        ("text", ["missing/*.txt"], {}, "--input missing/*.txt matches no file"),
        ("text", ["x" * 5000], {}, "does not exist"),
        ("text", ["."], {"document_separator": ""}, "--document-separator is empty"),
        (
            "text",
            ["."],
            {"document_separator": "\udcff"},
            "--document-separator '\\udcff' is not valid UTF-8",
        ),
        ("jsonl", ["."], {}, "--input . holds no file that ends in .jsonl, .jsonl.gz"),
        ("parquet", ["."], {}, "--input . holds no file that ends in .parquet"),
        ("text", ["a.txt", "*.txt"], {}, "--input names a.txt twice"),
    ],
)
def test_a_wrong_request_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    inputs: list[str],
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    assert message in refusal(source, *inputs, **options)

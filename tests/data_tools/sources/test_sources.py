"""Check that each source yields exactly its documents, in order, and names what it cannot read."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpus.run import TokenizeRequest, tokenize_corpus
from data_tools.errors import DataError
from data_tools.sources import SOURCE_KINDS, Slice, Source, SourceRequest, open_source
from data_tools.sources import text as text_module
from data_tools.sources.registry import _KINDS
from tests.data_tools.conftest import json_lines, read_documents, varied_documents, zstd

DOCUMENTS = varied_documents(30)
WHOLE = 1 << 30


def source_of(source: str, *inputs: Path | str, **options: Any) -> Source:
    return open_source(SourceRequest(source=source, inputs=tuple(map(str, inputs)), **options))


def documents(source: str, *inputs: Path | str, slice_bytes: int = WHOLE, **options: Any) -> list[str]:
    return [str(document) for document in read_documents(source_of(source, *inputs, **options), slice_bytes)]


def slices(source: str, *inputs: Path | str, slice_bytes: int, **options: Any) -> list[Slice]:
    return source_of(source, *inputs, **options).slices(slice_bytes)


def refusal(source: str, *inputs: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        documents(source, *inputs, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("source", ["jsonl", "parquet", "instructions"])
def test_files_of_a_folder_that_are_skipped_are_counted(tmp_path: Path, source: str) -> None:
    ending = "parquet" if source == "parquet" else "jsonl"
    for name in (f"a.{ending}", "b.xyz", "sub/c.xyz", "README", "d.jsonl.bz2", ".hidden", ".git/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = ["4 files with other endings skipped: .xyz (2), .bz2 (1), without an ending (1)"]
    assert source_of(source, tmp_path).notices() == expected
    assert source_of(source, tmp_path, tmp_path / "sub" / "c.xyz").notices() == [
        "3 files with other endings skipped: .bz2 (1), .xyz (1), without an ending (1)"
    ]
    assert source_of(source, tmp_path / f"a.{ending}").notices() == []


# Text


def test_a_file_is_a_document_byte_for_byte(tmp_path: Path) -> None:
    texts = ["a\r\nb\rc\n", "", "no newline at the end", "\ufeffwith a \ufeffmark"]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_bytes(text.encode())
    assert documents("text", tmp_path) == [*texts[:3], "with a \ufeffmark"]
    separated = documents("text", tmp_path / "3.txt", document_separator=" ")
    assert separated == ["with", "a", "\ufeffmark"], "only the mark at the beginning of a file is left out"


def test_folders_are_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ["b.txt", "a.md", "sub/c.txt", ".hidden", ".git/config", "B.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents("text", tmp_path) == ["B.txt", "a.md", "b.txt", "sub/c.txt"]
    assert documents("text", f"{tmp_path}/*.txt") == ["B.txt", "b.txt"]
    assert documents("text", f"{tmp_path}/**/*.txt") == ["B.txt", "b.txt", "sub/c.txt"]
    assert documents("text", tmp_path / "sub", tmp_path / "a.md") == ["sub/c.txt", "a.md"]


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(tmp_path: Path) -> None:
    for name in ["data/z/a.txt", "elsewhere/b.txt"]:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "z" / "again").symlink_to(tmp_path / "elsewhere")
    assert documents("text", tmp_path / "data") == ["elsewhere/b.txt", "data/z/a.txt"]


SEPARATORS = ["\n\n", "<|endoftext|>", "§", "x", "ab", "aba", "aa", "ab§ab"]


@given(
    pieces=st.lists(st.sampled_from(["", "a", "b", "ab", "\n", "x", "§", "漢", "é<|endof|>", "aba"]), max_size=30),
    separator=st.sampled_from(SEPARATORS),
    slice_bytes=st.integers(1, 60),
    read_bytes=st.integers(1, 20),
    compressed=st.booleans(),
)
@settings(deadline=None)
def test_a_separator_divides_as_str_split_does_wherever_files_are_cut(
    pieces: list[str], separator: str, slice_bytes: int, read_bytes: int, compressed: bool
) -> None:
    texts = ["".join(pieces), separator.join(pieces), "".join(pieces[::2]) + separator + separator[:-1]]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(text_module, "READ_BYTES", read_bytes):
        for index, text in enumerate(texts):
            content = text.encode()
            name = f"{index}.txt.gz" if compressed else f"{index}.txt"
            Path(folder, name).write_bytes(gzip.compress(content) if compressed else content)
        found = documents("text", folder, document_separator=separator, slice_bytes=slice_bytes)
    # Empty pieces are not documents, so their number does not matter.
    assert list(filter(None, found)) == [piece for text in texts for piece in text.split(separator) if piece]


def test_a_file_with_a_separator_is_cut_unless_it_is_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one--two--three--four")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"five--six"))
    cut = slices("text", tmp_path, slice_bytes=6, document_separator="--")
    assert [part.path for part in cut] == [f"{tmp_path}/a.txt"] * 4 + [f"{tmp_path}/b.txt.gz"]
    assert [(part.start, part.stop) for part in cut[:4]] == [(0, 5), (5, 10), (10, 15), (15, 21)]


def test_small_files_are_grouped(tmp_path: Path) -> None:
    for index in range(10):
        (tmp_path / f"{index}.txt").write_text("x" * 10)
    assert [(part.start, part.stop) for part in slices("text", tmp_path, slice_bytes=30)] == [
        (0, 3),
        (3, 6),
        (6, 9),
        (9, 10),
    ]


def test_a_pipe_in_a_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    assert refusal("text", tmp_path).startswith(f"--input {tmp_path / 'a.txt'} is a pipe or a device")
    assert refusal("text", "-").startswith("--input - is a pipe or a device; write the documents to a file first")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.txt", {}),
        ("a.txt", {"document_separator": "\n"}),
        ("a.txt.gz", {}),
        ("a.txt.gz", {"document_separator": "\n"}),
        ("a.jsonl.gz", {}),
    ],
)
def test_files_that_are_valid_utf8_but_not_text_are_refused(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("member.txt"))
    for content, message in (
        (buffer.getvalue(), "is a tar archive; extract the files in it"),
        (("Some text.\n" * 9).encode("utf-16-le"), "is text in UTF-16; save it as UTF-8"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        source = "jsonl" if ".jsonl" in name else "text"
        assert refusal(source, tmp_path / name, **options) == f"{tmp_path / name} {message}"


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_a_text_that_ends_in_zeros_is_refused(tmp_path: Path, separator: str | None) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"A text.\n\nAnother " + bytes(100))
    assert "".join(documents("text", path, document_separator=separator)).endswith("\0")
    path.write_bytes(b"A text.\n\nAnother " + bytes(4000))
    place = f"{path}: the document at byte {0 if separator is None else 9}"
    message = f"{place} ends in zeros, as after an interrupted copy; copy or download the file again"
    assert refusal("text", path, document_separator=separator) == message


def test_html_pages_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("a.txt", "<p>"), ("b.txt", "\n<!DOCTYPE html>"), ("c.txt", "<html>")):
        (tmp_path / name).write_text(content)
    [line] = source_of("text", tmp_path).notices()
    assert line.startswith(f"2 of 3 files begin as HTML pages, such as {tmp_path / 'b.txt'}: their tags are tokenized")
    assert documents("text", tmp_path) == ["<p>", "\n<!DOCTYPE html>", "<html>"]
    monkeypatch.setattr(text_module, "_MAX_HEADS", 2)
    assert source_of("text", tmp_path).notices()[0].startswith("1 of 2 files")
    assert not source_of("text", tmp_path / "a.txt").notices()


@pytest.mark.parametrize("name", ["b.jsonl", "b.ndjson.gz"])
def test_json_lines_that_are_read_as_text_are_counted(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / "a.json", tmp_path / name):
        path.write_text('{"text": "a"}\n')
    [line] = source_of("text", tmp_path).notices()
    assert line.startswith(f"1 of 2 files are named as JSON lines, such as {tmp_path / name}: the keys and quotes")
    assert line.endswith("use --source jsonl")


@pytest.mark.parametrize(("source", "options"), [("jsonl", {}), ("text", {"document_separator": "\n\n"})])
def test_a_range_in_which_no_document_begins_is_skipped_in_constant_memory(
    tmp_path: Path, source: str, options: dict[str, Any]
) -> None:
    """Read a range of a large file without the separator, as with a wrong separator."""
    (tmp_path / "a.jsonl").write_bytes(b" " * (32 << 20))
    opened = source_of(source, tmp_path, **options)
    parts = opened.slices(16 << 20)
    assert len(parts) == 2
    tracemalloc.start()
    assert list(opened.read(parts[1])) == []
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("separator", [None, "\n"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
@pytest.mark.parametrize("slice_bytes", [3, WHOLE])
def test_invalid_utf8_is_named_with_its_offset(
    tmp_path: Path, separator: str | None, compress: Callable[[bytes], bytes], slice_bytes: int
) -> None:
    suffix = {bytes: "", gzip.compress: ".gz", zstd: ".zst"}[compress]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress("é\nb\nc".encode() + b"\xff\nd"))
    message = refusal("text", path, document_separator=separator, slice_bytes=slice_bytes)
    assert f"{path}: byte 6 (0xff) is not valid UTF-8" in message


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
    # Consecutive gzip members or zstd frames are one stream.
    content = compress(json_lines(DOCUMENTS[:10])) + compress(json_lines(DOCUMENTS[10:]))
    (tmp_path / f"a{suffix}").write_bytes(content)
    (tmp_path / "other.txt").write_text("no JSON")
    assert documents("jsonl", tmp_path) == DOCUMENTS
    assert documents("jsonl", tmp_path / f"a{suffix}") == DOCUMENTS


def test_a_compressed_file_longer_than_one_read(tmp_path: Path) -> None:
    texts = [f"{index} " * 10_000 for index in range(100)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(texts)))
    assert documents("jsonl", tmp_path) == texts


@given(
    lines=st.lists(
        st.one_of(
            st.text(max_size=10).map(lambda text: json.dumps({"text": text}).encode()),
            st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=10).map(
                lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
            ),
            st.sampled_from([b"", b"  ", b"\r", b'{"text": ""}\r']),
        ),
        max_size=15,
    ),
    ends_in_newline=st.booleans(),
    marked=st.booleans(),
    slice_bytes=st.integers(1, 80),
    compressed=st.booleans(),
)
@settings(deadline=None)
def test_every_line_is_read_once_and_in_order_wherever_files_are_cut(
    lines: list[bytes], ends_in_newline: bool, marked: bool, slice_bytes: int, compressed: bool
) -> None:
    content = b"\xef\xbb\xbf" * marked + b"\n".join(lines) + b"\n" * ends_in_newline
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.jsonl", "b.jsonl"):
            path = Path(folder, name + ".zst" if compressed else name)
            path.write_bytes(zstd(content) if compressed else content)
        found = documents("jsonl", folder, slice_bytes=slice_bytes)
        cut = slices("jsonl", folder, slice_bytes=slice_bytes)
    assert found == 2 * [json.loads(line)["text"] for line in lines if line.strip()]
    assert not compressed or len(cut) == 2


def test_blank_lines_marks_and_windows_newlines_are_no_documents(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}'
    (tmp_path / "a.jsonl").write_bytes(content + b"\n" + content)  # as with cat
    assert documents("jsonl", tmp_path) == ["a", "b", "a", "b"]


def test_another_field_and_lone_surrogates(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "a\\ud800b", "text": 1}\n')
    assert documents("jsonl", tmp_path, text_field="body") == ["a\ud800b"]


@pytest.mark.parametrize("slice_bytes", [7, 200, WHOLE])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_a_file_that_is_one_array_is_read_once(tmp_path: Path, name: str, indent: int | None, slice_bytes: int) -> None:
    content = "\ufeff" + " " * 100 + json.dumps([{"text": text} for text in DOCUMENTS], indent=indent)
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    assert documents("jsonl", tmp_path, slice_bytes=slice_bytes) == DOCUMENTS


def test_faults_of_an_array_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"body": "b"}]')
    assert refusal("jsonl", path).startswith(f"{path}: record 1: no field 'text'; the fields are body; choose one")
    path.write_text('[{"text": "a"}, {"text": "b"}')
    assert refusal("jsonl", path).startswith(f"{path}:1: not valid JSON (column 30: ")
    path.write_text('[\n  {"text": "a"},\n  {"text": "b"}\n  {"text": "c"}\n]\n')
    assert refusal("jsonl", path).startswith(f"{path}:4: not valid JSON (column 3: Expecting ',' delimiter); the file")
    path.write_bytes(b'\xef\xbb\xbf[{"text": "\xff"}]')
    assert refusal("jsonl", path).startswith(f"{path}: byte 14 (0xff) is not valid UTF-8")
    path.write_text("[" * 100_000)
    assert refusal("jsonl", path).startswith(f"{path}: not valid JSON (too many nested lists or objects)")


@pytest.mark.parametrize("content", ["{}\n", "[{}]"])
def test_a_number_of_any_length_is_read(tmp_path: Path, content: str) -> None:
    """Python converts no integers of more than 4300 digits."""
    (tmp_path / "a.json").write_text(content.replace("{}", json.dumps({"text": "a"})[:-1] + f', "n": {"9" * 5000}}}'))
    assert documents("jsonl", tmp_path) == ["a"]


def test_chats_are_pointed_to_their_own_source(tmp_path: Path) -> None:
    for record in ({"messages": []}, {"conversations": []}, {"instruction": "a", "output": "b"}):
        (tmp_path / "a.jsonl").write_text(json.dumps(record))
        assert refusal("jsonl", tmp_path).endswith("--source instructions reads JSON files of chats and instructions")


@pytest.mark.parametrize("key", ["train-data", "it's", "naïve", "k" * 41, "a\nb"])
def test_a_command_is_not_advised_for_a_key_that_it_cannot_contain(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({key: [{"text": "b"}]}))
    message = refusal("jsonl", tmp_path)
    assert "no field 'text'" in message
    assert "jq" not in message
    (tmp_path / "a.jsonl").write_text(json.dumps({key: [{"text": "b"}], "items": [{"text": "b"}]}))
    assert refusal("jsonl", tmp_path).endswith("jq -c '.items[]'")


@pytest.mark.parametrize(
    "cut", ['{"text": "b', '{"text": "b"', '{"text": "b", "n": tru', '{"text": "b\\u00', '{"text"', "{", '{"n": 1']
)
def test_a_file_that_ends_inside_a_record_may_be_cut_off(tmp_path: Path, cut: str) -> None:
    """The program jq cannot read such a file."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + cut)
    expected = "a.jsonl:2: not valid JSON (the file ends inside a record; if it was cut off, copy or download it again)"
    assert expected in refusal("jsonl", tmp_path)
    (tmp_path / "a.jsonl").write_text(cut + '\n{"text": "a"}')
    assert "the file ends" not in refusal("jsonl", tmp_path)


@pytest.mark.parametrize("line", ['{"text": "b" "c"}', '{"text": "b"},', "b"])
def test_a_file_that_ends_after_a_bad_record_is_not_cut_off(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    assert "a.jsonl:2: not valid JSON (column " in refusal("jsonl", tmp_path)


@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_a_file_that_ends_inside_a_character_may_be_cut_off(tmp_path: Path, source: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "я'.encode()[:-1])
    cure = "if the file was cut off, copy or download it again; otherwise, convert the file to UTF-8"
    assert f"{path}: byte 10 (0xd1) is not valid UTF-8 (unexpected end of data); {cure}" in refusal(source, path)


@pytest.mark.parametrize("source", ["jsonl", "instructions"])
def test_a_record_that_contains_the_magic_of_a_tar_archive_is_read(tmp_path: Path, source: str) -> None:
    record = json.dumps({"text": "a", "instruction": "b", "output": "c" * 300})
    (tmp_path / "a.jsonl").write_text(record[:257] + "ustar" + record[257:])
    assert len(documents(source, tmp_path)) == 1


BAD_LINES = {
    b'{"text": "b" "c"}': "a.jsonl:2: not valid JSON (column 14: Expecting ',' delimiter); each line must be one",
    b'{"text": "b"': "a.jsonl:2: not valid JSON (the line ends inside a record; jq -c . writes each record of a file",
    b'{ \r\n "text": "b"\r\n}': "a.jsonl:2: not valid JSON (the line ends inside a record; jq -c . writes each",
    b'["b"]': "a.jsonl:2: holds a list; each record must be one JSON object",
    b'"b"': "a.jsonl:2: holds a string",
    "\u00a0".encode(): "a.jsonl:2: not valid JSON (column 1: Expecting value)",
    '{"text": "b"}\u3000'.encode(): "a.jsonl:2: not valid JSON (column 14: Extra data)",
    bytes(9): "a.jsonl:2: not valid JSON (the line holds only NUL bytes, as after an interrupted copy)",
    b'{"items": [{"text": "b"}]}': "--text-field, or, if the records are in items, write them as lines with jq -c "
    "'.items[]'",
    b'{"body": "b", "id": 1}': "a.jsonl:2: no field 'text'; the fields are body, id; choose one with --text-field",
    b"{}": "a.jsonl:2: no field 'text'; the fields are none",
    b'{"text": null}': "a.jsonl:2: field 'text' is null, it must be a string; the fields are text",
    b'{"text": ["b"], "id": 1}': "a.jsonl:2: field 'text' is a list, it must be a string; the fields are text, id",
    b'{"text": "\xff"}': "a.jsonl: byte 24 (0xff) is not valid UTF-8",
    b"[" * 100_000: "a.jsonl:2: not valid JSON (too many nested lists or objects)",
    b"1" * 5000: "a.jsonl:2: holds a number; each record must be one JSON object",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("slice_bytes", [7, 15, WHOLE])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str, slice_bytes: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    assert message in refusal("jsonl", tmp_path, slice_bytes=slice_bytes)


def test_the_number_of_a_bad_line_is_right_far_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCUMENTS * 100) + b"\n\n{}\n")
    for slice_bytes in (1000, 1 << 20, WHOLE):
        assert "a.jsonl:3003: no field 'text'" in refusal("jsonl", tmp_path, slice_bytes=slice_bytes)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json_lines(DOCUMENTS) + b'{"text": "\xff"}\n')
    offset = (tmp_path / "a.json").stat().st_size - 4
    assert f"a.json: byte {offset} (0xff)" in refusal("jsonl", tmp_path, slice_bytes=100)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"x" * 50])
def test_a_damaged_compressed_file_is_named(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes], damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(damage(compress(json_lines(DOCUMENTS))))
    assert refusal("jsonl", path).startswith(f"cannot read {path}: ")


# Parquet


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_by_record_batch(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"{index} {DOCUMENTS[index % 30]}" for index in range(2000)]
    nested = pa.array([{"text": "the field of another column"}] * 2000)
    table = pa.table({"page": nested, "page.text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert documents("parquet", tmp_path, text_field="page.text") == texts


@given(
    texts=st.lists(st.text(max_size=5), max_size=20),
    row_group_size=st.integers(1, 8),
    slice_bytes=st.integers(1, 400),
)
@settings(deadline=None)
def test_every_row_is_read_once_and_in_order_wherever_files_are_cut(
    texts: list[str], row_group_size: int, slice_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = pa.table({"text": pa.array(texts, pa.string())})
        for name in ("a.parquet", "b.parquet"):
            pq.write_table(table, Path(folder, name), row_group_size=row_group_size)
        assert documents("parquet", folder, slice_bytes=slice_bytes) == 2 * texts


def test_parquet_is_cut_at_row_groups(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * 1000] * 500})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, use_dictionary=False)
    cut = slices("parquet", tmp_path, slice_bytes=210_000)
    assert [(part.start, part.stop) for part in cut] == [(0, 2), (2, 4), (4, 5)]
    assert source_of("parquet", tmp_path).text_bytes() == pytest.approx(500_000, rel=0.05)


def test_parquet_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a", None], "id": [1, 2]}), path)
    assert f"{path}: no column 'text'; the columns are body, id; choose" in refusal("parquet", path)
    assert (
        f"{path}: column 'id' holds int64, it must hold strings; choose another one with --text-field, or write"
        in refusal("parquet", path, text_field="id")
    )
    assert f"{path}: row 1: column 'body' is null" in refusal("parquet", path, text_field="body")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert f"{path}: has several columns 'text'; choose another one" in refusal("parquet", path)
    pq.write_table(pa.table({f"column {n}": [1] for n in range(25)}), path)
    assert "column 19, and 5 more; choose one with --text-field" in refusal("parquet", path)
    path.write_bytes(b"PAR1 no parquet at all")
    assert refusal("parquet", path).startswith(f"cannot read {path}: ")


def test_a_row_is_named_by_its_number_in_the_file_in_a_later_slice_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 1234 + [None]}), tmp_path / "a.parquet", row_group_size=100)
    for slice_bytes in (1, 1000, WHOLE):
        message = refusal("parquet", tmp_path, slice_bytes=slice_bytes)
        assert message == f"{tmp_path}/a.parquet: row 1234: column 'text' is null, it must be a string"


def test_checksums_in_parquet_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["the same text again and again"] * 10})
    pq.write_table(
        table, path, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    content = path.read_bytes()
    path.write_bytes(content.replace(b"text again", b"taxt again", 1))
    assert refusal("parquet", path).startswith(f"cannot read {path}: ")
    assert "CRC" in refusal("parquet", path)


def test_invalid_utf8_in_parquet_is_named(tmp_path: Path) -> None:
    column = pa.array([b"fine", b"bad \xff"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "a.parquet: row 1: byte 4 of 'text' is not valid UTF-8" in refusal("parquet", tmp_path)


# Hugging Face datasets


@pytest.fixture
def hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    requests = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", requests)
    yield
    requests.assert_not_called()


@pytest.mark.usefixtures("hub_offline")
def test_a_local_folder_of_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(json_lines(DOCUMENTS))
    (folder / "test.jsonl").write_bytes(json_lines(["held out"]))
    assert documents("hf", folder) == DOCUMENTS
    assert documents("hf", folder, dataset_split="test") == ["held out"]


@pytest.mark.usefixtures("hub_offline")
def test_a_local_folder_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, texts in (("parquet", DOCUMENTS), ("other", ["another dataset"])):
        Path(folder).mkdir()
        pq.write_table(pa.table({"body": texts}), f"{folder}/train.parquet")
    assert documents("hf", "parquet", text_field="body") == DOCUMENTS, "the name of a builder means the folder"
    assert "csv is neither a folder here nor a dataset on the hub" in refusal("hf", "csv")


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": DOCUMENTS})
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "dev": dataset.select([3])}).save_to_disk(tmp_path / "many")
    assert documents("hf", tmp_path / "one") == DOCUMENTS
    assert documents("hf", tmp_path / "many") == DOCUMENTS
    assert documents("hf", tmp_path / "many", dataset_split="dev") == DOCUMENTS[3:4]
    assert "has no split 'val'; it has train, dev; choose one with --dataset-split" in refusal(
        "hf", tmp_path / "many", dataset_split="val"
    )
    assert "has no split 'val': it is one Dataset" in refusal("hf", tmp_path / "one", dataset_split="val")
    dataset.select([]).save_to_disk(tmp_path / "empty")
    assert "the dataset or one of its splits has no rows" in refusal("hf", tmp_path / "empty")


@pytest.mark.usefixtures("hub_offline")
def test_files_of_a_dataset_that_are_skipped_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl.gz"):
        content = json_lines(DOCUMENTS[:2])
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert source_of("hf", folder).notices() == []
    (folder / "README.md").write_text("No metadata.")
    (folder / "c.parquet").touch()
    notices = source_of("hf", folder).notices()
    assert notices == ["2 files with other endings skipped: .md (1), .parquet (1)"]
    assert documents("hf", folder) == DOCUMENTS[:2] * 2
    assert "metadata" not in caplog.text + capfd.readouterr().err, "the library's warning about README.md is silent"


@pytest.mark.usefixtures("hub_offline")
def test_dataset_faults_are_named(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.jsonl").write_bytes(b'{"body": "a"}\n')
    assert "[0:1]: row 0: no field 'text'; the fields are body" in refusal("hf", tmp_path / "dataset")
    assert "cannot read dataset nobody/nothing (config None, split train)" in refusal("hf", "nobody/nothing")
    message = refusal("hf", tmp_path / "dataset", dataset_split="nope", text_field="body")
    assert "split nope" in message


@pytest.mark.usefixtures("hub_offline")
def test_each_file_of_a_streamed_dataset_is_a_slice(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    for index in range(3):
        content = json_lines(DOCUMENTS[index * 10 : index * 10 + 10])
        (tmp_path / "dataset" / f"train-{index}.jsonl").write_bytes(content)
    opened = source_of("hf", tmp_path / "dataset")
    parts = opened.slices(1)
    assert [list(opened.read(part)) for part in parts] == [DOCUMENTS[:10], DOCUMENTS[10:20], DOCUMENTS[20:]]
    assert sum(part.text_bytes or 0 for part in parts) == pytest.approx(len(json_lines(DOCUMENTS)), rel=0.01)


def test_a_saved_dataset_is_cut_by_rows_that_keep_their_numbers(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": [*DOCUMENTS * 5, None]}).save_to_disk(tmp_path / "one")
    opened = source_of("hf", tmp_path / "one")
    text_bytes = sum(len(text.encode()) for text in DOCUMENTS * 5)
    assert opened.text_bytes() == pytest.approx(text_bytes, rel=0.05)
    assert len(opened.slices(WHOLE)) == 1
    assert len(opened.slices(1)) == 151, "a row is not divided"
    parts = opened.slices(text_bytes // 49)
    assert 49 <= len(parts) <= 52
    assert sum((list(opened.read(part)) for part in parts[:-1]), []) == (DOCUMENTS * 5)[: parts[-1].start]
    with pytest.raises(DataError, match=r"one\[\d+:151\]: row 150: field 'text' is null"):
        list(opened.read(parts[-1]))


class _Hub:
    """A dataset on the hub. Each commit adds a document."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.documents = {"c1": ["a"], "c2": ["a", "b"]}
        self.newest = "c1"
        self.calls: list[tuple[object, ...]] = []
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.dataset_info)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def dataset_info(self, name: str, *, revision: str | None) -> mock.Mock:
        if revision not in (None, *self.documents):
            raise huggingface_hub.errors.RevisionNotFoundError("404", response=mock.Mock())
        return mock.Mock(sha=revision or self.newest)

    def load_dataset(self, *names: object, split: str, streaming: bool, revision: str) -> datasets.IterableDataset:
        self.calls.append((*names, split, streaming))
        return datasets.Dataset.from_dict({"text": self.documents[revision]}).to_iterable_dataset()


def test_fineweb_edu_is_the_streamed_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(monkeypatch)
    for config in ("sample-10BT", "sample-100BT"):
        options = {} if config == "sample-10BT" else {"dataset_config": config}
        assert documents("fineweb-edu", **options) == ["a"]
        assert set(hub.calls) == {("HuggingFaceFW/fineweb-edu", config, "train", True)}
        hub.calls.clear()


def test_an_update_on_the_hub_does_not_change_a_request_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _Hub(monkeypatch)
    opened = source_of("hf", "me/texts")
    (source_slice,) = opened.slices(WHOLE)
    hub.newest = "c2"
    assert source_slice.path == "me/texts@c1"
    assert list(opened.read(source_slice)) == ["a"]
    assert documents("hf", "me/texts") == ["a", "b"]
    assert documents("hf", "me/texts@c1") == ["a"]
    request = TokenizeRequest(source="hf", inputs=("me/texts",), out=tmp_path / "out", workers=1)
    assert (tokenize_corpus(request).made or {})["dataset"] == "me/texts@c2"
    assert refusal("hf", "me/texts@v9") == "dataset me/texts has no revision 'v9' on the hub"


# The embedded corpus


def test_the_standard_library_is_millions_of_characters_of_text() -> None:
    texts = documents("python-stdlib")
    assert texts == documents("python-stdlib", slice_bytes=1 << 20)
    assert sum(map(len, texts)) > 5_000_000
    assert len(set(texts)) > 0.98 * len(texts)
    with open(os.__file__, encoding="utf-8", newline="") as file:
        assert texts.count(file.read()) == 1
    assert any(text.startswith('The "if" statement') for text in texts)


def test_the_standard_library_holds_no_tests_and_no_packages() -> None:
    with open(json.__file__, encoding="utf-8", newline="") as file:
        assert file.read() in documents("python-stdlib")
    with open(pytest.__file__, encoding="utf-8", newline="") as file:
        assert file.read() not in documents("python-stdlib")


# Files at URLs


@pytest.fixture
def bucket() -> Iterator[Callable[[str, bytes], str]]:
    """Put a file into fsspec's file system in memory; returns its URL."""
    files = fsspec.filesystem("memory")

    def put(name: str, content: bytes) -> str:
        files.pipe(f"/bucket/{name}", content)
        return f"memory://bucket/{name}"

    yield put
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("slice_bytes", [100, 5000, WHOLE])
def test_json_lines_at_a_url(bucket: Callable[[str, bytes], str], slice_bytes: int) -> None:
    bucket("a/1.jsonl", json_lines(DOCUMENTS[:10]))
    bucket("a/2.jsonl.gz", gzip.compress(json_lines(DOCUMENTS[10:20])))
    bucket("a/b/3.jsonl.zst", zstd(json_lines(DOCUMENTS[20:])))
    bucket("a/.hidden.jsonl", b"no JSON")
    bucket("a/.hidden/4.jsonl", b"no JSON")
    bucket("a/readme.md", b"no JSON")
    assert documents("jsonl", "memory://bucket/a", slice_bytes=slice_bytes) == DOCUMENTS
    assert documents("jsonl", "memory://bucket/a/*.jsonl*", slice_bytes=slice_bytes) == DOCUMENTS[:20]
    assert documents("jsonl", "memory://bucket/a/**/*.jsonl*", slice_bytes=slice_bytes) == DOCUMENTS
    assert documents("jsonl", "memory://bucket/a/2.jsonl.gz", slice_bytes=slice_bytes) == DOCUMENTS[10:20]
    bucket("a/1.jsonl", json_lines(DOCUMENTS) + b"{}\n")
    message = refusal("jsonl", "memory://bucket/a/1.jsonl", slice_bytes=slice_bytes)
    assert "/bucket/a/1.jsonl:31: no field 'text'" in message


def test_files_at_a_url_that_are_skipped_are_counted(bucket: Callable[[str, bytes], str]) -> None:
    bucket("skipped/b.xyz", b"")
    folder = bucket("skipped/a.jsonl", json_lines(DOCUMENTS[:1])).removesuffix("a.jsonl")
    assert source_of("jsonl", folder).notices() == ["1 file with other endings skipped: .xyz (1)"]
    assert source_of("jsonl", f"{folder}*").notices() == []


def test_text_and_parquet_at_a_url(bucket: Callable[[str, bytes], str], tmp_path: Path) -> None:
    url = bucket("all.txt", "\n==\n".join(DOCUMENTS).encode())
    for slice_bytes in (50, 3000, WHOLE):
        assert documents("text", url, document_separator="\n==\n", slice_bytes=slice_bytes) == DOCUMENTS
    assert documents("text", url) == ["\n==\n".join(DOCUMENTS)]
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet", row_group_size=4)
    url = bucket("a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert documents("parquet", url, slice_bytes=2000) == DOCUMENTS


def test_faults_at_a_url_are_named(bucket: Callable[[str, bytes], str]) -> None:
    url = bucket("a.jsonl.gz", gzip.compress(json_lines(DOCUMENTS))[:200])
    assert refusal("jsonl", url).startswith("cannot read memory:///bucket/a.jsonl.gz: ")
    assert "memory://bucket/none does not exist" in refusal("jsonl", "memory://bucket/none")
    assert "memory://bucket/*.txt matches no file" in refusal("text", "memory://bucket/*.txt")
    assert "--input memory://bucket does not exist, or holds no file that ends in .parquet" in refusal(
        "parquet", "memory://bucket"
    )
    assert "nosuch://a/b" in refusal("text", "nosuch://a/b")


def test_a_file_at_a_url_that_grew_is_another_source(bucket: Callable[[str, bytes], str]) -> None:
    before = source_of("jsonl", bucket("a.jsonl", json_lines(DOCUMENTS[:3]))).options()
    assert before == source_of("jsonl", "memory://bucket/a.jsonl").options()
    assert before != source_of("jsonl", bucket("a.jsonl", json_lines(DOCUMENTS[:4]))).options()


# All sources


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
    assert ", ".join(SOURCE_KINDS) in refusal("nosuch")


@pytest.mark.parametrize(
    ("source", "inputs", "options", "message"),
    [
        ("text", [], {}, "--source text needs --input"),
        ("hf", [], {}, "--source hf needs --input"),
        ("hf", ["a", "b"], {}, "--source hf takes one --input, a dataset's name or folder, not 2"),
        ("python-stdlib", ["a"], {}, "--source python-stdlib takes no --input; text, jsonl, "),
        ("fineweb-edu", ["a"], {}, "--source fineweb-edu takes no --input"),
        ("jsonl", ["a"], {"document_separator": "x"}, "takes no --document-separator; only text does"),
        ("text", ["a"], {"text_field": "body"}, "--source text takes no --text-field; jsonl, "),
        ("text", ["a"], {"dataset_split": "dev"}, "takes no --dataset-split; hf, fineweb-edu do"),
        ("text", ["missing"], {}, "--input missing does not exist"),
        ("text", ["missing/*.txt"], {}, "--input missing/*.txt matches no file"),
        ("text", ["x" * 5000], {}, "does not exist"),
        ("text", ["links/b.txt"], {}, "--input links/b.txt is a link to gone.txt, which does not exist"),
        ("text", ["links"], {}, "cannot read links/b.txt: it is a link to gone.txt, which does not exist"),
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
        ("text", ["/dev/null"], {}, "--input /dev/null is a pipe or a device; write the documents to a file first"),
        ("hf", ["a.txt"], {}, "--source hf takes a dataset's name or folder, and a.txt is a file; give its folder"),
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
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.txt").symlink_to("gone.txt")
    assert message in refusal(source, *inputs, **options)


def test_every_kind_can_be_opened() -> None:
    assert set(_KINDS) == set(SOURCE_KINDS)

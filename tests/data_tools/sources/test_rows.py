"""Check that every kind of source passes on the rows that it cannot read, and goes on after them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.errors import DataError
from data_tools.sources import BadRowError, SourceRequest, open_source
from data_tools.sources.rows import parse_rows

ANSWERED = '{"instruction": "a", "output": "b"}'


def write_jsonl(path: Path) -> None:
    path.write_text('{"text": "a"}\n{"text": 1}\n{"text": "b"}\n')


def write_array(path: Path) -> None:
    path.write_text(json.dumps([{"text": "a"}, {}, {"text": "b"}], indent=1))


def write_instructions(path: Path) -> None:
    path.write_text(f"{ANSWERED}\n[]\n{ANSWERED}\n")


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"]}), path)


def write_bad_utf8_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"a", b"\xff", b"b"]).view(pa.string())}), path)


def write_text(path: Path) -> None:
    path.mkdir()
    for number, content in enumerate([b"a", b"\xff", b"b"]):
        (path / f"{number}.txt").write_bytes(content)


def write_dataset(path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", None, "b"]}).save_to_disk(path)


@pytest.mark.parametrize(
    ("kind", "name", "write", "place"),
    [
        ("jsonl", "a.jsonl", write_jsonl, "a.jsonl:2: field 'text' is a number"),
        ("jsonl", "a.json", write_array, "a.json: record 1: no field 'text'"),
        ("instructions", "a.jsonl", write_instructions, "a.jsonl:2: no message has the role assistant"),
        ("parquet", "a.parquet", write_parquet, "a.parquet: row 1: column 'text' is null"),
        ("parquet", "a.parquet", write_bad_utf8_parquet, "a.parquet: row 1: byte 0 of 'text' is not valid UTF-8"),
        ("text", "texts", write_text, "1.txt: byte 0 (0xff) is not valid UTF-8"),
        ("hf", "saved", write_dataset, ": row 1: field 'text' is null"),
    ],
)
def test_a_bad_row_is_passed_on_and_the_next_rows_are_read(
    tmp_path: Path, kind: str, name: str, write: Callable[[Path], None], place: str
) -> None:
    write(tmp_path / name)
    source = open_source(SourceRequest(source=kind, inputs=(str(tmp_path / name),)))  # type: ignore[arg-type]
    (source_slice,) = source.slices(1 << 30)
    bad: list[BadRowError] = []
    assert len(list(source.read(source_slice, bad.append))) == 2
    (error,) = bad
    assert place in str(error)
    with pytest.raises(DataError) as caught:
        list(source.read(source_slice))
    assert str(caught.value) == str(error)


def test_the_place_of_a_row_becomes_text_only_if_it_is_shown() -> None:
    class Place:
        def __str__(self) -> str:
            raise AssertionError

    def parse(row: int) -> int:
        if row == 1:
            raise BadRowError(Place(), "bad")
        return row

    assert list(parse_rows(range(3), parse, lambda error: None)) == [0, 2]

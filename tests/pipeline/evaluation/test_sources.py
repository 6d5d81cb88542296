"""Rows and their hashes are read from files and from the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_tools.errors import DataError
from pipeline.evaluation.sources import HubData, read_file, read_hub
from tests.pipeline.evaluation.conftest import ALONE, PIQA, write_lines

HUB = HubData("owner/name", "plain", "validation", "train")


def test_parquet_holds_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PIQA), tmp_path / "piqa.parquet")
    assert (
        read_file(tmp_path / "piqa.parquet").rows == read_file(write_lines(tmp_path / "piqa.jsonl", PIQA)).rows == PIQA
    )


def test_each_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffA first passage \r\n\n  A second one\u2028is one line\n".encode())
    rows = read_file(tmp_path / "a.txt", by_line=True).rows
    assert rows == [{"text": "A first passage"}, {"text": "  A second one\u2028is one line"}]
    [whole] = read_file(tmp_path / "a.txt").rows
    assert whole["text"].encode() == (tmp_path / "a.txt").read_bytes().removeprefix(b"\xef\xbb\xbf")
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(DataError, match="is empty"):
        read_file(tmp_path / "a.txt", by_line=True)


def test_text_in_utf16_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("A text without a mark.".encode("utf-16-le"))
    with pytest.raises(DataError, match="a.txt is text in UTF-16; save it as UTF-8"):
        read_file(tmp_path / "a.txt")


def test_an_invalid_parquet_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR")
    with pytest.raises(DataError, match="a.parquet is not a whole Parquet file"):
        read_file(tmp_path / "a.parquet")


def test_the_hub_is_asked_for_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: Any, split: str) -> list[dict[str, Any]]:
        asked.append((*names, split))
        return [{"b": 1, "a": "é"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_hub(HUB, ALONE)
    assert set(asked) == {("owner/name", "plain", "validation")}
    assert rows.origin == "hf://datasets/owner/name (plain), validation"
    assert rows.sha256 == hashlib.sha256('{"a": "é", "b": 1}\n'.encode()).hexdigest()


def test_without_a_network_the_error_suggests_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="cannot load hf://datasets/owner/name .plain., validation .*: no route; give"):
        read_hub(HUB, ALONE)

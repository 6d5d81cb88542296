"""Data of a run is found from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.errors import DataError
from pipeline.config.paths import find_path, is_same_place
from pipeline.config.schema import RunConfig


def test_a_relative_path_is_looked_for_here_and_where_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, here = tmp_path / "start", tmp_path / "here"
    for folder in (start / "data", start / "both", here / "both"):
        folder.mkdir(parents=True)
    run = RunConfig(working_dir=str(start))
    monkeypatch.chdir(here)
    assert find_path("both", run) == "both"
    assert find_path("data", run) == str(start / "data")
    assert find_path("s3://bucket/data", run) == "s3://bucket/data"
    with pytest.raises(DataError, match=f"no: neither {here}/no nor {start}/no exists; start the command in"):
        find_path("no", run)


@pytest.mark.parametrize("same_folder", [True, False])
def test_without_a_second_folder_the_path_stays_as_it_is(
    same_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_path("no", RunConfig(working_dir=str(tmp_path) if same_folder else None)) == "no"
    assert find_path("/no/data", RunConfig(working_dir="/other")) == "/no/data"


def test_places_with_other_names_or_seen_from_another_folder_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, start = tmp_path / "here", tmp_path / "start"
    here.mkdir()
    monkeypatch.chdir(here)
    assert is_same_place("./runs/a/", "runs/a", str(here))
    assert is_same_place("runs/a", "runs/a", str(start)), "the project has moved"
    assert is_same_place("../start/runs/a", "runs/a", str(start))
    assert is_same_place("s3://bucket/a/", "s3://bucket/a", None)
    assert not is_same_place("runs/b", "runs/a", str(here))
    assert not is_same_place("s3://bucket/a", "bucket/a", str(here))

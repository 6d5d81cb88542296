"""What was written can be read anywhere in the stream."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.shards.manifest import ShardRecord
from data_tools.shards.reader import open_split
from data_tools.shards.verification import verify
from data_tools.shards.writer import BATCH_TOKENS
from tests.support.shard_folders import (
    edit_manifest,
    random_tokens,
    write_folder,
)


def test_reads_equal_slices_of_the_concatenation(tmp_path: Path, format: str) -> None:
    # The second and the third shard are shorter than a window, the last spans three record batches.
    shards = [random_tokens(size, size) for size in (1000, 3, 1, 50, 2 * BATCH_TOKENS + 9)]
    write_folder(tmp_path / "data", shards, format)
    everything = np.concatenate(shards)
    stream = open_split(tmp_path / "data", "train")
    assert (stream.tokens, stream.documents, stream.utf8_bytes) == (everything.size, 5, 3 * everything.size)
    starts = np.array([0, 1, 995, 999, 1000, 1003, 1004, 1053, 1054, BATCH_TOKENS + 1050, everything.size - 64])
    for start in starts.tolist():
        for length in (0, 1, 5, 64):
            np.testing.assert_array_equal(stream.read(start, length), everything[start : start + length])
    windows = stream.read_windows(starts, 64)
    assert windows.dtype == np.uint16
    np.testing.assert_array_equal(windows, np.stack([everything[start : start + 64] for start in starts]))
    np.testing.assert_array_equal(stream.read(0, stream.tokens), everything)


def test_reads_return_copies(tmp_path: Path, format: str) -> None:
    write_folder(tmp_path / "data", [random_tokens(10)], format)
    stream = open_split(tmp_path / "data", "train")
    stream.read(0, 10)[:] = 1
    np.testing.assert_array_equal(stream.read(0, 10), random_tokens(10))


def test_no_windows_are_an_empty_array(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", [random_tokens(10)])
    stream = open_split(tmp_path / "data", "train")
    assert stream.read_windows(np.array([], dtype=np.int64), 4).shape == (0, 4)


def test_pickling_does_not_copy_the_tokens(tmp_path: Path, format: str) -> None:
    write_folder(tmp_path / "data", [random_tokens(100_000)], format)
    pickled = pickle.dumps(open_split(tmp_path / "data", "train"))
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).read(0, 100_000), random_tokens(100_000))


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (9, 2), (10, 1), (0, 11), (5, -1)])
def test_a_read_outside_the_stream_is_refused(tmp_path: Path, start: int, length: int) -> None:
    write_folder(tmp_path / "data", [random_tokens(10)])
    stream = open_split(tmp_path / "data", "train")
    with pytest.raises(DataError, match="has 10 tokens"):
        stream.read(start, length)
    with pytest.raises(DataError, match="has 10 tokens"):
        stream.read_windows(np.array([0, start]), length)


def test_an_id_outside_the_vocabulary_is_refused_when_read(tmp_path: Path, format: str) -> None:
    tokens = random_tokens(100)
    tokens[50] = 50257
    write_folder(tmp_path / "data", [tokens], format)
    stream = open_split(tmp_path / "data", "train")
    np.testing.assert_array_equal(stream.read(0, 50), tokens[:50])
    with pytest.raises(DataError, match="token 50257.*vocabulary ends at 50256"):
        stream.read(0, 51)
    with pytest.raises(DataError, match="token 50257.*vocabulary ends at 50256"):
        stream.read_windows(np.array([0, 50]), 10)
    with pytest.raises(DataError, match="token 50257.*vocabulary ends at 50256"):
        verify(tmp_path / "data")


def test_a_missing_split_names_those_that_exist(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", [random_tokens(20)])
    with pytest.raises(DataError, match="has no split 'val'; it has train"):
        open_split(tmp_path / "data", "val")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", [random_tokens(20)])
    np.save(tmp_path / "data" / "val_000000.npy", np.zeros(0, dtype=np.uint16))
    record = ShardRecord("val_000000.npy", "val", 0, 0, 0, "0" * 64)
    edit_manifest(lambda manifest: manifest["shards"].append(vars(record)))(tmp_path / "data")
    with pytest.raises(DataError, match="split 'val' is empty; splits with tokens: train"):
        open_split(tmp_path / "data", "val")

"""Shards are written as other programs read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np

from data_tools.shards.writer import BATCH_TOKENS, ShardWriter
from tests.data_tools.conftest import environment
from tests.support.shard_folders import (
    random_tokens,
    write_folder,
)


def test_numpy_loads_a_npy_shard(tmp_path: Path) -> None:
    tokens = random_tokens(BATCH_TOKENS + 5)
    write_folder(tmp_path / "data", [tokens])
    loaded = np.load(tmp_path / "data" / "train_000000.npy")
    assert loaded.dtype == np.uint16
    np.testing.assert_array_equal(loaded, tokens)


def test_datasets_opens_an_arrow_shard(tmp_path: Path) -> None:
    tokens = random_tokens(2 * BATCH_TOKENS + 5)
    write_folder(tmp_path / "data", [tokens], "arrow")
    dataset = datasets.Dataset.from_file(str(tmp_path / "data" / "train_000000.arrow"))
    assert dataset.column_names == ["tokens"]
    np.testing.assert_array_equal(dataset.with_format("numpy")["tokens"][:], tokens)


def test_a_shard_does_not_depend_on_how_its_tokens_were_grouped(tmp_path: Path, format: str) -> None:
    tokens = random_tokens(BATCH_TOKENS + 1000)
    whole = write_folder(tmp_path / "whole", [tokens], format).shards[0]
    writer = ShardWriter(tmp_path / "whole", f"train_000001.{format}", "train")
    for piece in np.array_split(tokens, 77):
        writer.append(piece, documents=0, utf8_bytes=0)
    assert writer.close().sha256 == whole.sha256


def test_an_aborted_shard_leaves_nothing(tmp_path: Path, format: str) -> None:
    writer = ShardWriter(tmp_path, f"train_000000.{format}", "train")
    writer.append(random_tokens(2 * BATCH_TOKENS), documents=1, utf8_bytes=1)
    assert list(tmp_path.iterdir())
    writer.abort()
    assert not list(tmp_path.iterdir())


WRITE_AND_COUNT = """
import sys
from pathlib import Path
import numpy as np
from data_tools.shards.writer import ShardWriter
from data_tools.shards.contents import Vocabulary, gpt2_tokenizer_record
tokens = np.array([50256, 15496], dtype=np.uint16)
writer = ShardWriter(Path(sys.argv[1]), "train_000000.arrow", "train")
writer.append(tokens, documents=1, utf8_bytes=5)
writer.close()
print(Vocabulary(gpt2_tokenizer_record()).count(tokens, "here").utf8_bytes, "pandas" in sys.modules)
"""


def test_writing_and_counting_do_not_import_pandas(tmp_path: Path) -> None:
    """Arrow imports pandas when it converts a numpy array, which takes longer than starting the program."""
    command = [sys.executable, "-c", WRITE_AND_COUNT, str(tmp_path)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["5", "False"]

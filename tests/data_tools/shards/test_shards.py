"""What is written can be read anywhere in the stream, and damage is refused by name."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from data_tools.errors import DataError
from data_tools.shards import (
    Manifest,
    ShardRecord,
    ShardWriter,
    SourceRecord,
    TokenizerRecord,
    load_manifest,
    open_split,
    require_unchanged,
    verify,
)
from data_tools.shards.writer import BATCH_TOKENS
from data_tools.storage.atomic import write_json_durably
from tests.data_tools.conftest import environment

END = 50256


def write_folder(folder: Path, shards: list[np.ndarray], format: str = "npy") -> Manifest:
    """Write one training shard an array, each of one document, and the manifest."""
    folder.mkdir(exist_ok=True)
    records = []
    for index, tokens in enumerate(shards):
        writer = ShardWriter(folder, f"train_{index:06d}.{format}", "train")
        writer.append(tokens, documents=int((tokens == END).sum()), utf8_bytes=3 * tokens.size)
        records.append(writer.close())
    manifest = Manifest(
        tokenizer=TokenizerRecord("gpt2", 50257, END, "0" * 64),
        source=SourceRecord("text", {"inputs": ["a.txt"]}),
        settings={"format": format},
        shards=tuple(records),
    )
    write_json_durably(folder / "manifest.json", manifest.to_json())
    return manifest


def random_tokens(size: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, END, size).astype(np.uint16)
    tokens[0] = END
    return tokens


@pytest.fixture(params=["npy", "arrow"])
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "data", [random_tokens(10), random_tokens(7)])
    assert load_manifest(tmp_path / "data") == manifest
    assert manifest.splits() == ("train",)
    assert manifest.tokens_of("train") == 17
    content = (tmp_path / "data" / "train_000001.npy").read_bytes()
    assert manifest.shards[1].sha256 == hashlib.sha256(content).hexdigest()


def test_a_npy_shard_is_what_numpy_itself_loads(tmp_path: Path) -> None:
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


def test_what_was_read_may_be_changed_without_harm(tmp_path: Path, format: str) -> None:
    write_folder(tmp_path / "data", [random_tokens(10)], format)
    stream = open_split(tmp_path / "data", "train")
    stream.read(0, 10)[:] = 1
    np.testing.assert_array_equal(stream.read(0, 10), random_tokens(10))


def test_no_windows_are_an_empty_array(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", [random_tokens(10)])
    stream = open_split(tmp_path / "data", "train")
    assert stream.read_windows(np.array([], dtype=np.int64), 4).shape == (0, 4)


def test_another_process_gets_the_files_not_a_copy_of_the_tokens(tmp_path: Path, format: str) -> None:
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


def test_verify_accepts_what_was_written(tmp_path: Path, format: str) -> None:
    manifest = write_folder(tmp_path / "data", [random_tokens(1000), random_tokens(10)], format)
    assert verify(tmp_path / "data") == manifest


def test_verify_sees_one_changed_bit(tmp_path: Path, format: str) -> None:
    write_folder(tmp_path / "data", [random_tokens(1000)], format)
    path = tmp_path / "data" / f"train_000000.{format}"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    open_split(tmp_path / "data", "train")
    with pytest.raises(DataError, match=f"train_000000.{format}: its SHA-256"):
        verify(tmp_path / "data")


class TestSeal:
    def test_it_stands_last_and_is_of_all_the_rest(self, tmp_path: Path) -> None:
        manifest = write_folder(tmp_path / "data", [random_tokens(10)])
        value = json.loads((tmp_path / "data" / "manifest.json").read_text())
        assert value == json.loads(json.dumps(manifest.to_json()))
        seal = value.popitem()
        assert seal == ("sha256", hashlib.sha256(json.dumps(value).encode()).hexdigest())

    def test_a_manifest_without_one_is_accepted(self, tmp_path: Path) -> None:
        """As other programs write it, and this one did before."""
        manifest = write_folder(tmp_path / "data", [random_tokens(10)])
        edit_manifest(lambda value: None)(tmp_path / "data")
        assert load_manifest(tmp_path / "data") == manifest
        assert verify(tmp_path / "data") == manifest

    def test_layout_and_indentation_do_not_matter(self, tmp_path: Path) -> None:
        manifest = write_folder(tmp_path / "data", [random_tokens(10)])
        edit_sealed_manifest(lambda value: None)(tmp_path / "data")
        assert load_manifest(tmp_path / "data") == manifest

    def test_no_bit_of_a_manifest_can_change_unnoticed(self, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        manifest = write_folder(folder, [random_tokens(20), random_tokens(30)])
        path = folder / "manifest.json"
        content = path.read_bytes()
        for at in range(0, len(content), 11):
            for bit in range(8):
                path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
                with pytest.raises(DataError) as caught:
                    load_manifest(folder)
                assert str(path) in str(caught.value) and "\n" not in str(caught.value), (at, bit)
        path.write_bytes(content)
        assert load_manifest(folder) == manifest


class TestDamageOfEachFile:
    """Whatever happens to a file of a data set, a run refuses to start on it, and says which file it is."""

    @pytest.fixture
    def folder(self, tmp_path: Path, format: str) -> Path:
        write_folder(tmp_path / "data", [random_tokens(20), random_tokens(30), random_tokens(3000)], format)
        return tmp_path / "data"

    @staticmethod
    def start_run(folder: Path) -> None:
        """What training does before its first step."""
        stream = open_split(folder, "train")
        for shard in stream.manifest.shards:
            require_unchanged(folder, shard)

    def expect_refused(self, path: Path, folder: Path) -> None:
        for check in (self.start_run, verify):
            with pytest.raises(DataError) as caught:
                check(folder)
            line = str(caught.value)
            assert str(folder) in line and path.name in line and "\n" not in line

    @pytest.mark.parametrize("index", range(4))
    def test_cut_anywhere(self, folder: Path, index: int) -> None:
        path = sorted(folder.iterdir())[index]
        content = path.read_bytes()
        for length in {0, 1, len(content) // 3, len(content) - 2 * (len(content) // 6), len(content) - 2}:
            path.write_bytes(content[:length])
            self.expect_refused(path, folder)

    @pytest.mark.parametrize("index", range(4))
    def test_grown(self, folder: Path, index: int) -> None:
        path = sorted(folder.iterdir())[index]
        path.write_bytes(path.read_bytes() + b"}")
        self.expect_refused(path, folder)

    @pytest.mark.parametrize("index", range(4))
    def test_deleted(self, folder: Path, index: int) -> None:
        path = sorted(folder.iterdir())[index]
        path.unlink()
        self.expect_refused(path, folder)

    @pytest.mark.parametrize("index", range(4))
    def test_a_folder_in_its_place(self, folder: Path, index: int) -> None:
        path = sorted(folder.iterdir())[index]
        path.unlink()
        path.mkdir()
        self.expect_refused(path, folder)

    def test_one_bit_of_a_shard(self, tmp_path: Path, format: str) -> None:
        """Every bit of the first 200 bytes, where the header is, and some of the others."""
        folder = tmp_path / "data"
        write_folder(folder, [random_tokens(20_000)], format)
        path = folder / f"train_000000.{format}"
        content = path.read_bytes()
        for at in [*range(200), *range(200, len(content), 977), *range(len(content) - 8, len(content))]:
            for bit in range(8) if at < 200 else (at % 8,):
                path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
                with pytest.raises(DataError) as caught:
                    self.start_run(folder)
                line = str(caught.value)
                assert str(path) in line and "\n" not in line, (at, bit)

    @pytest.mark.parametrize("index", range(1, 4))
    def test_another_shard_of_the_same_length(self, folder: Path, format: str, index: int) -> None:
        path = sorted(folder.iterdir())[index]
        other = folder.parent / "other"
        write_folder(other, [random_tokens(size, seed=1) for size in (20, 30, 3000)], format)
        path.write_bytes((other / path.name).read_bytes())
        open_split(folder, "train")
        self.expect_refused(path, folder)


def test_verify_counts_documents(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", [random_tokens(1000)])
    edit_manifest(lambda value: value["shards"][0].update(documents=2))(tmp_path / "data")
    with pytest.raises(DataError, match="holds 1 documents.*says 2"):
        verify(tmp_path / "data")


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the manifest as another program would, which does not seal it."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / "manifest.json").read_text())
        value.pop("sha256", None)
        change(value)
        (folder / "manifest.json").write_text(json.dumps(value))

    return damage


def edit_sealed_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the manifest and leave its seal as it is."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / "manifest.json").read_text())
        change(value)
        (folder / "manifest.json").write_text(json.dumps(value))

    return damage


def edit_shard(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = next(folder.glob("train_000001.*"))
        path.write_bytes(change(path.read_bytes()))

    return damage


def write_shard_of(tokens: np.ndarray) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        np.save(folder / "train_000001.npy", tokens)

    return damage


def write_arrow_of(table: pa.Table) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with pa.ipc.new_stream(str(folder / "train_000001.arrow"), table.schema) as stream:
            stream.write_table(table)

    return damage


def write_manifest(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "manifest.json").write_text(content)

    return damage


MANIFEST_DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    (write_manifest('{"format_version": 1'), "manifest.json is not valid JSON"),
    (write_manifest("[]"), r"must be an object, it is \[\]"),
    (edit_manifest(lambda m: m.update(format_version=2)), "format_version is 2, this program reads 1"),
    (edit_manifest(lambda m: m.update(format_version=True)), "format_version is True"),
    (edit_manifest(lambda m: m.pop("format_version")), "format_version is None"),
    (edit_manifest(lambda m: m.update(dtype="uint32")), "dtype is 'uint32', it must be 'uint16'"),
    (edit_manifest(lambda m: m.pop("tokenizer")), "missing key 'tokenizer'"),
    (edit_manifest(lambda m: m.update(extra=1)), "unknown key 'extra'; the keys are"),
    (edit_manifest(lambda m: m["tokenizer"].update(vocab_size="many")), "vocab_size must be an integer"),
    (edit_manifest(lambda m: m["source"].pop("kind")), "source: missing key 'kind'"),
    (edit_manifest(lambda m: m.update(shards={})), "shards must be a list"),
    (edit_manifest(lambda m: m["shards"][1].pop("tokens")), r"shards\[1\]: missing key 'tokens'"),
    (edit_manifest(lambda m: m["shards"][1].update(tokens=True)), r"shards\[1\]: tokens must be an integer"),
    (edit_manifest(lambda m: m["shards"][1].update(tokens=-1)), "tokens must be 0 or more"),
    (edit_manifest(lambda m: m["shards"][1].update(sha256="x")), "sha256 must be 64"),
    (edit_manifest(lambda m: m["shards"][1].update(file="../train_000001.npy")), "inside the folder"),
    (edit_manifest(lambda m: m["shards"][1].update(file="/etc/passwd")), "inside the folder"),
    (edit_manifest(lambda m: m["shards"][1].update(file="")), "inside the folder"),
    (edit_manifest(lambda m: m["shards"][1].update(file="train.txt")), r"ends in \.npy, \.arrow or \.bin"),
    (edit_manifest(lambda m: m["shards"][1].update(tokens=31)), "holds 30 tokens, manifest.json says 31"),
    (edit_manifest(lambda m: m.update(shards=[])), "has no split 'train'; it has none"),
    (edit_sealed_manifest(lambda m: m["shards"][1].update(tokens=29)), "contents changed"),
    (edit_sealed_manifest(lambda m: m["shards"].reverse()), "contents changed"),
    (edit_sealed_manifest(lambda m: m["settings"].update(seed=1)), "contents changed"),
    (edit_sealed_manifest(lambda m: m.update(sha256="0" * 64)), r"contents changed \(its own SHA-256 differs\)"),
    (edit_sealed_manifest(lambda m: m.update(sha256=7)), "contents changed"),
    (edit_sealed_manifest(lambda m: m["shards"][1].update(tokens=-1)), "tokens must be 0 or more"),
]

SHARD_DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("npy", lambda folder: (folder / "train_000001.npy").unlink(), "train_000001.npy is missing"),
    ("arrow", lambda folder: (folder / "train_000001.arrow").unlink(), "train_000001.arrow is missing"),
    ("npy", edit_shard(lambda content: content[:-1]), "not a whole shard"),
    ("npy", edit_shard(lambda content: content[:-2]), "not a whole shard"),
    ("npy", edit_shard(lambda content: content + b"\0\0"), "bytes after its tokens"),
    ("npy", edit_shard(lambda content: content[:50]), "not a whole shard"),
    ("npy", edit_shard(lambda content: b""), "not a whole shard"),
    ("npy", edit_shard(lambda content: b"\0" * len(content)), "not a whole shard"),
    ("npy", write_shard_of(np.zeros(30, dtype=np.uint32)), "its header says otherwise"),
    ("npy", write_shard_of(np.zeros((2, 15), dtype=np.uint16)), "its header says otherwise"),
    ("npy", write_shard_of(np.zeros(30, dtype=">u2")), "its header says otherwise"),
    ("npy", write_shard_of(np.zeros(29, dtype=np.uint16)), "holds 29 tokens, manifest.json says 30"),
    ("arrow", edit_shard(lambda content: content[:-1]), "not a whole shard"),
    ("arrow", edit_shard(lambda content: content[:-8]), "does not end where its tokens end"),
    ("arrow", edit_shard(lambda content: content[:-40]), "not a whole shard"),
    ("arrow", edit_shard(lambda content: content + b"\0"), "does not end where its tokens end"),
    ("arrow", edit_shard(lambda content: b""), "not a whole shard"),
    ("arrow", edit_shard(lambda content: b"\0" * len(content)), "not a whole shard"),
    ("arrow", write_arrow_of(pa.table({"ids": pa.array([1], pa.uint16())})), "one column must be 'tokens'"),
    ("arrow", write_arrow_of(pa.table({"tokens": pa.array([1], pa.int64())})), "must be 'tokens' of uint16"),
    ("arrow", write_arrow_of(pa.table({"tokens": pa.array([None], pa.uint16())})), "not a whole shard"),
]


def label(value: object) -> str:
    """The id of a test's argument: the same in every process, which a function's address is not."""
    return value[:40] if isinstance(value, str) else "damage"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_split(folder, "train")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(("damage", "message"), MANIFEST_DAMAGE, ids=label)
def test_a_damaged_manifest_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "data"
    write_folder(folder, [random_tokens(20), random_tokens(30)])
    damage(folder)
    refused(folder, message)


@pytest.mark.parametrize(("format", "damage", "message"), SHARD_DAMAGE, ids=label)
def test_a_damaged_shard_is_refused(tmp_path: Path, format: str, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "data"
    write_folder(folder, [random_tokens(20), random_tokens(30)], format)
    damage(folder)
    refused(folder, message)


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


def test_opening_does_not_read_the_tokens(tmp_path: Path) -> None:
    """A shard of ten billion tokens, nearly all a hole, opens at once, and a read touches only what it returns."""
    folder = tmp_path / "data"
    write_folder(folder, [random_tokens(20)])
    tokens = 10**10
    sparse = np.lib.format.open_memmap(folder / "train_000000.npy", mode="w+", dtype=np.uint16, shape=(tokens,))
    sparse[tokens - 3 :] = [5, 6, 7]
    del sparse
    edit_manifest(lambda manifest: manifest["shards"][0].update(tokens=tokens))(folder)
    assert open_split(folder, "train").read(tokens - 4, 4).tolist() == [0, 5, 6, 7]


MANY_SHARDS = """
import os, resource, sys
import numpy as np
from data_tools.shards import open_split
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
stream = open_split(sys.argv[1], "train")
after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
print(int(stream.read(0, stream.tokens).astype(np.int64).sum()), after - before)
"""


def test_shards_by_the_thousand_need_no_file_descriptors(tmp_path: Path) -> None:
    """1,500 mapped shards where a process may open 256 files."""
    folder = tmp_path / "data"
    folder.mkdir()
    shards = [np.array([END, index], dtype=np.uint16) for index in range(1500)]
    one = write_folder(folder, shards[:1])
    records = []
    for index, tokens in enumerate(shards):
        np.save(folder / f"train_{index:06d}.npy", tokens)
        records.append(ShardRecord(f"train_{index:06d}.npy", "train", 2, 1, 6, "0" * 64))
    manifest = Manifest(one.tokenizer, one.source, one.settings, tuple(records))
    write_json_durably(folder / "manifest.json", manifest.to_json())
    result = subprocess.run(
        [sys.executable, "-c", MANY_SHARDS, str(folder)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(sum(int(tokens.sum()) for tokens in shards)), "0"]


WRITE_AND_COUNT = """
import sys
from pathlib import Path
import numpy as np
from data_tools.shards import ShardWriter
from data_tools.shards.contents import Vocabulary, gpt2_tokenizer_record
tokens = np.array([50256, 15496], dtype=np.uint16)
writer = ShardWriter(Path(sys.argv[1]), "train_000000.arrow", "train")
writer.append(tokens, documents=1, utf8_bytes=5)
writer.close()
print(Vocabulary(gpt2_tokenizer_record()).count(tokens, "here").utf8_bytes, "pandas" in sys.modules)
"""


def test_writing_and_counting_do_not_wait_for_pandas(tmp_path: Path) -> None:
    """Which Arrow imports by itself when it is given a numpy array; that takes longer than starting."""
    command = [sys.executable, "-c", WRITE_AND_COUNT, str(tmp_path)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["5", "False"]

"""Tokens are converted to the formats of other programs and back without a change, completely or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.errors import DataError
from data_tools.formats.conversion import adopt_in_place, convert
from data_tools.formats.opening import open_collection
from data_tools.formats.plan import ConvertRequest
from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.shards.manifest import Manifest, SourceRecord, TokenizerRecord, load_manifest
from data_tools.shards.reader import open_split
from data_tools.shards.verification import verify
from data_tools.shards.writer import ShardWriter
from data_tools.storage.atomic import write_json_durably
from tests.data_tools.conftest import environment
from tests.support.token_files import (
    END,
    LLMC_MAGIC,
    LLMC_VERSION,
    Tokens,
    cut,
    documents,
    few_examples,
    put,
    small_pieces,
    token_runs,
    totals,
    utf8_bytes_of,
    write_llmc,
    write_ours,
    write_sound,
)


class TestRoundTrips:
    @few_examples
    @given(
        train=token_runs,
        val=token_runs,
        to=st.sampled_from(["npy", "arrow", "nanogpt", "llmc"]),
        size=st.integers(10, 60),
    )
    def test_round_trip(self, train: Tokens, val: Tokens, to: str, size: int) -> None:
        with small_pieces() as folder:
            write_ours(folder / "ours", {"train": [train[:7], train[7:]], "val": [val]})
            shard_tokens = None if to == "nanogpt" else size
            convert(ConvertRequest(source=folder / "ours", out=folder / "there", to=to, shard_tokens=shard_tokens))
            back = ConvertRequest(
                source=folder / "there",
                source_format=to if to in ("nanogpt", "llmc") else "native",
                out=folder / "back",
                to="npy",
                shard_tokens=size,
            )
            convert(back)
            assert totals(folder / "back") == totals(folder / "ours")
            verify(folder / "back")

    @pytest.mark.parametrize("size", [1, 15, 16, 17, 32, 33])
    @pytest.mark.parametrize("to", ["npy", "arrow", "nanogpt", "llmc"])
    def test_sizes_around_the_chunk_size(self, to: str, size: int) -> None:
        tokens: Tokens = np.arange(size, dtype=np.uint16)
        with small_pieces() as folder:
            write_ours(folder / "ours", {"train": [tokens]})
            convert(ConvertRequest(source=folder / "ours", out=folder / "there", to=to))
            collection = open_collection(folder / "there")
            stream = collection.splits["train"].stream
            assert stream.tokens == size
            assert stream.read(0, size).tolist() == tokens.tolist()

    @pytest.mark.parametrize("to", ["npy", "arrow", "nanogpt", "llmc"])
    def test_an_empty_split_is_refused(self, tmp_path: Path, to: str) -> None:
        write_ours(tmp_path / "ours", {"train": [documents(3)], "val": [np.empty(0, np.uint16)]})
        with pytest.raises(DataError, match="the split 'val' has no tokens"):
            convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "out", to=to))
        assert not (tmp_path / "out").exists()

    def test_npy_to_arrow_and_back_is_the_same_folder(self, tmp_path: Path) -> None:
        ours = write_ours(tmp_path / "ours", {"train": [documents(50), documents(9, 1)], "val": [documents(7, 2)]})
        convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "arrow", to="arrow"))
        convert(ConvertRequest(source=tmp_path / "arrow", out=tmp_path / "npy", to="npy"))
        assert load_manifest(tmp_path / "npy").content_sha256() == ours.content_sha256()
        for shard in ours.shards:
            assert (tmp_path / "npy" / shard.file).read_bytes() == (tmp_path / "ours" / shard.file).read_bytes()

    def test_shards_after_nanogpt_are_cut_as_in_stage_1(self, tmp_path: Path) -> None:
        """Shards end before the document that would exceed their size, whatever file it came from."""
        everything = documents(100)
        starts = [*np.flatnonzero(everything == END).tolist(), everything.size]
        convert_to = {"to": "npy", "shard_tokens": 200}
        write_ours(tmp_path / "ours", {"train": [everything]})
        convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "nanogpt", to="nanogpt"))
        convert(ConvertRequest(source=tmp_path / "nanogpt", out=tmp_path / "back", **convert_to))  # type: ignore[arg-type]
        at = 0
        for shard in load_manifest(tmp_path / "back").shards:
            stop = at + shard.tokens
            assert stop in starts and shard.tokens <= 200
            following = [start for start in starts if start > stop]
            assert not following or following[0] - at > 200, "another document would have fitted"
            at = stop
        assert at == everything.size

    def test_a_document_larger_than_a_shard_gets_its_own_shard(self) -> None:
        large = np.full(100, 7, dtype=np.uint16)
        tokens = np.concatenate([[END, 1], [END], large, [END, 2], [END, 3], [END], large]).astype(np.uint16)
        with small_pieces() as folder:
            tokens.tofile(folder / "train.bin")
            convert(ConvertRequest(source=folder / "train.bin", out=folder / "out", to="npy", shard_tokens=10))
            assert [shard.tokens for shard in load_manifest(folder / "out").shards] == [2, 101, 4, 101]

    def test_a_mask_travels_with_its_shard(self, tmp_path: Path) -> None:
        tokens = documents(20)
        scored = np.random.default_rng(0).random(tokens.size) < 0.5
        (tmp_path / "ours").mkdir()
        writer = ShardWriter(tmp_path / "ours", "train_000000.npy", "train")
        writer.append(tokens, documents=20, utf8_bytes=5, scored=scored)
        manifest = Manifest(gpt2_tokenizer_record(), SourceRecord("text", {}), {}, (writer.close(),))
        write_json_durably(tmp_path / "ours" / "manifest.json", manifest.to_json())
        convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "arrow", to="arrow"))
        verify(tmp_path / "arrow")
        stream = open_split(tmp_path / "arrow", "train")
        assert stream.read_mask_windows(np.array([0]), tokens.size)[0].tolist() == scored.tolist()
        assert stream.utf8_bytes == 5
        for to in ("nanogpt", "llmc"):
            with pytest.raises(DataError, match="train_000000.mask.npy says which tokens are scored.*would be lost"):
                convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / to, to=to))
            assert not (tmp_path / to).exists()


class TestForeignFiles:
    def test_nanogpt_reads_what_is_exported(self, tmp_path: Path) -> None:
        train, val = documents(30), documents(4, 1)
        write_ours(tmp_path / "ours", {"train": [train[:100], train[100:]], "val": [val]})
        convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "out", to="nanogpt"))
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.bin", "val.bin"]
        # The line of nanoGPT's train.py.
        assert np.memmap(tmp_path / "out" / "train.bin", dtype=np.uint16, mode="r").tolist() == train.tolist()

    def test_llmc_reads_what_is_exported(self, tmp_path: Path) -> None:
        train, val = documents(60), documents(4, 1)
        write_ours(tmp_path / "ours", {"train": [train], "val": [val]})
        request = ConvertRequest(
            source=tmp_path / "ours", out=tmp_path / "out", to="llmc", name="fineweb", shard_tokens=400
        )
        convert(request)
        files = sorted(path.name for path in (tmp_path / "out").glob("*.bin"))
        assert files[0] == "fineweb_train_000001.bin" and files[-1] == "fineweb_val_000000.bin"
        read = []
        for path in sorted((tmp_path / "out").glob("fineweb_train_*.bin")):
            # As modded-nanogpt's _load_data_shard does.
            header = np.fromfile(path, dtype=np.int32, count=256)
            assert (header[0], header[1]) == (LLMC_MAGIC, LLMC_VERSION) and not header[3:].any()
            tokens = np.fromfile(path, dtype=np.uint16, offset=1024)
            assert header[2] == tokens.size
            read.append(tokens)
        assert [tokens.size for tokens in read[:-1]] == [400] * (len(read) - 1)
        np.testing.assert_array_equal(np.concatenate(read), train)

    def test_without_validation_llmcs_numbers_begin_at_1(self, tmp_path: Path) -> None:
        write_ours(tmp_path / "ours", {"train": [documents(60)]})
        convert(ConvertRequest(source=tmp_path / "ours", out=tmp_path / "out", to="llmc"))
        assert [path.name for path in (tmp_path / "out").glob("*.bin")] == ["out_train_000001.bin"]

    def test_nanogpts_separator_stays_after_each_document(self, tmp_path: Path) -> None:
        np.array([1, 2, END, 3, END], dtype="<u2").tofile(tmp_path / "train.bin")
        np.array([4, END], dtype="<u2").tofile(tmp_path / "val.bin")
        convert(ConvertRequest(source=tmp_path, out=tmp_path / "out", to="npy"))
        assert totals(tmp_path / "out") == {
            "train": ([1, 2, END, 3, END], 2, utf8_bytes_of([1, 2, 3])),
            "val": ([4, END], 1, utf8_bytes_of([4])),
        }
        manifest = load_manifest(tmp_path / "out")
        assert manifest.tokenizer == gpt2_tokenizer_record()
        assert (manifest.source.kind, manifest.source.options["files"], manifest.source.options["bytes"]) == (
            "nanogpt",
            2,
            14,
        )

    @pytest.mark.parametrize(("to", "end_of_text", "counted"), [("arrow", None, 0), ("npy", 64, 2), ("llmc", 64, 2)])
    def test_tokens_of_another_vocabulary(self, to: str, end_of_text: int | None, counted: int, tmp_path: Path) -> None:
        np.array([64, 1, 64, 3], dtype="<u2").tofile(tmp_path / "train.bin")
        (tmp_path / "meta.pkl").write_bytes(b"a pickle that nobody opens")
        request = ConvertRequest(source=tmp_path, out=tmp_path / "out", to=to, vocab_size=65, end_of_text=end_of_text)
        convert(request)
        manifest = verify(tmp_path / "out")
        assert totals(tmp_path / "out") == {"train": ([64, 1, 64, 3], counted, 0)}
        assert manifest.tokenizer == TokenizerRecord("other", 65, -1 if end_of_text is None else end_of_text, "")
        with pytest.raises(DataError, match="token 64, the vocabulary ends at 59"):
            convert(ConvertRequest(source=tmp_path, out=tmp_path / "small", to=to, vocab_size=60))
        with pytest.raises(DataError, match="--vocab-size: .*out: its manifest names its vocabulary"):
            convert(ConvertRequest(source=tmp_path / "out", out=tmp_path / "again", to=to, vocab_size=65))
        for size, end in ((None, 64), (64, 64), (65, -1), (65_537, 0)):
            with pytest.raises(DataError, match="--vocab-size"):
                ConvertRequest(source=tmp_path, out=tmp_path / "out", to=to, vocab_size=size, end_of_text=end)

    def test_bytes_of_text_are_those_of_the_vocabulary(self, tmp_path: Path) -> None:
        """Import counts the bytes that decoding gives, for every id."""
        tokens = np.arange(END + 1, dtype=np.uint16)
        write_llmc(tmp_path / "x_train_000001.bin", tokens)
        manifest = adopt_in_place(tmp_path)
        assert manifest.shards[0].utf8_bytes == utf8_bytes_of(tokens)

    def test_ids_of_another_vocabulary_keep_their_shards(self, byte_corpus: Path, tmp_path: Path) -> None:
        convert(ConvertRequest(source=byte_corpus, out=tmp_path / "arrow", to="arrow"))
        assert totals(tmp_path / "arrow") == totals(byte_corpus)
        assert load_manifest(tmp_path / "arrow").tokenizer == load_manifest(byte_corpus).tokenizer
        with pytest.raises(DataError, match="is of the tokenizer 'bytes'.*--to npy or arrow without --shard-tokens"):
            convert(ConvertRequest(source=byte_corpus, out=tmp_path / "llmc", to="llmc"))


class TestInPlace:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Write shards of llm.c with documents across their ends, and the same tokens as npy in ``ours``."""
        train, val = documents(200), documents(20, 1)
        write_ours(tmp_path / "ours", {"train": [train], "val": [val]})
        (tmp_path / "llmc").mkdir()
        for index, piece in enumerate(np.array_split(train, 5)):
            write_llmc(tmp_path / "llmc" / f"fineweb_train_{index + 1:06d}.bin", piece)
        write_llmc(tmp_path / "llmc" / "fineweb_val_000000.bin", val)
        return tmp_path / "llmc"

    def test_training_reads_the_same_as_from_npy(self, folder: Path) -> None:
        before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
        adopt_in_place(folder)
        assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.bin")} == before
        ours = folder.parent / "ours"
        assert totals(folder) == totals(ours)
        for split in ("train", "val"):
            here, there = open_split(folder, split), open_split(ours, split)
            assert (here.tokens, here.documents, here.utf8_bytes) == (there.tokens, there.documents, there.utf8_bytes)
            starts = np.random.default_rng(0).integers(0, here.tokens - 64, 50)
            np.testing.assert_array_equal(here.read_windows(starts, 65), there.read_windows(starts, 65))
        verify(folder)

    def test_the_manifest_does_not_depend_on_the_path_of_the_folder(self, folder: Path) -> None:
        moved = folder.rename(folder.parent / "moved")
        first = adopt_in_place(moved)
        (moved / "manifest.json").unlink()
        assert adopt_in_place(moved.rename(folder)).content_sha256() == first.content_sha256()

    def test_a_shard_that_changes_later_is_noticed(self, folder: Path) -> None:
        adopt_in_place(folder)
        put("fineweb_train_000002.bin", 1200, "<H", 5)(folder)
        with pytest.raises(DataError, match=r"fineweb_train_000002\.bin: its SHA-256 is not the one in manifest"):
            verify(folder)
        cut("fineweb_train_000003.bin", 2)(folder)
        with pytest.raises(DataError, match=r"fineweb_train_000003\.bin is not a whole shard.*its header says"):
            open_split(folder, "train")

    def test_a_damaged_shard_leaves_no_manifest(self, folder: Path) -> None:
        put("fineweb_train_000002.bin", 1200, "<H", 60000)(folder)
        with pytest.raises(DataError, match=r"fineweb_train_000002\.bin holds token 60000"):
            adopt_in_place(folder)
        assert not [path for path in folder.iterdir() if path.suffix != ".bin"]

    def test_the_named_format_is_used(self, folder: Path) -> None:
        with pytest.raises(DataError, match="no file ends in .npy, as those of npy do"):
            adopt_in_place(folder, "npy")
        assert adopt_in_place(folder, "llmc").source.kind == "llmc"

    def test_the_command_can_be_repeated(self, folder: Path) -> None:
        manifest = adopt_in_place(folder)
        before = (folder / "manifest.json").stat()
        assert adopt_in_place(folder).content_sha256() == manifest.content_sha256()
        assert (folder / "manifest.json").stat() == before

    def test_a_manifest_that_does_not_name_the_shards_is_refused_with_the_cure(self, folder: Path) -> None:
        splits = adopt_in_place(folder).splits()
        with pytest.raises(DataError, match=r"--split-of: .* to change them, delete .*manifest\.json and repeat"):
            adopt_in_place(folder, split_of={"fineweb_val_000000.bin": "train"})
        shard = folder / "fineweb_train_000002.bin"
        added = folder / "fineweb_train_000006.bin"
        added.write_bytes(shard.read_bytes())
        with pytest.raises(DataError, match=r"does not name fineweb_train_000006\.bin; to add them, delete"):
            adopt_in_place(folder)
        (folder / "manifest.json").unlink()
        assert {record.file for record in adopt_in_place(folder).shards} >= {added.name, shard.name}
        shard.unlink()
        with pytest.raises(DataError, match=r"lacks fineweb_train_000002\.bin; copy them again"):
            adopt_in_place(folder)
        (folder / "manifest.json").unlink()
        assert adopt_in_place(folder).splits() == splits

    def test_only_folders_of_llmcs_shards(self, folder: Path) -> None:
        with pytest.raises(DataError, match="is not a folder"):
            adopt_in_place(folder / "fineweb_val_000000.bin")
        write_sound(folder / "other", "nanogpt")
        with pytest.raises(DataError, match="are in the format nanogpt; only those of llmc and npy can stay in place"):
            adopt_in_place(folder / "other")


class TestBuildNanogpt:
    """build-nanogpt's ``fineweb.py`` saves shards of documents that cross the ends of shards, with ``numpy.save``."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Write its shards in ``edu_fineweb10B``, and the same tokens as ours in ``ours``."""
        train, val = documents(200), documents(20, 1)
        write_ours(tmp_path / "ours", {"train": [train], "val": [val]})
        folder = tmp_path / "edu_fineweb10B"
        folder.mkdir()
        np.save(folder / "edufineweb_val_000000.npy", val)
        for index, piece in enumerate(np.array_split(train, 3)):
            np.save(folder / f"edufineweb_train_{index + 1:06d}.npy", piece)
        return folder

    def test_import(self, folder: Path) -> None:
        out = folder.parent / "out"
        conversion = convert(ConvertRequest(source=folder, source_format="npy", out=out, to="npy", shard_tokens=500))
        assert conversion.source_format == "npy" and open_collection(folder).format == "npy"
        verify(out)
        assert totals(out) == totals(folder.parent / "ours")
        assert list(open_collection(folder / "edufineweb_val_000000.npy").splits) == ["val"]

    @pytest.mark.parametrize("source_format", ["auto", "npy"])
    def test_in_place_adds_only_a_manifest(self, folder: Path, source_format: str) -> None:
        before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
        adopt_in_place(folder, source_format)
        assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.npy")} == before
        assert sorted(path.name for path in folder.iterdir()) == [*sorted(before), "manifest.json"]
        verify(folder)
        assert totals(folder) == totals(folder.parent / "ours")
        assert load_manifest(folder).source.kind == "npy"

    def test_a_mask_is_not_taken_for_tokens(self, folder: Path) -> None:
        """A folder of ours that lost its manifest may not lose its masks, too."""
        np.save(folder / "edufineweb_train_000001.mask.npy", np.zeros(9, np.uint8))
        with pytest.raises(DataError, match=r"train_000001\.mask\.npy.*its header says \|u1"):
            adopt_in_place(folder)


class TestNothingHalfWritten:
    @pytest.fixture
    def ours(self, tmp_path: Path) -> Path:
        write_ours(tmp_path / "ours", {"train": [documents(100), documents(50, 1)], "val": [documents(10, 2)]})
        return tmp_path / "ours"

    @pytest.mark.parametrize("to", ["npy", "arrow", "nanogpt", "llmc"])
    def test_an_error_leaves_nothing(self, ours: Path, to: str) -> None:
        class InterruptedError(Exception):
            pass

        def interrupt(done_bytes: int) -> None:
            if done_bytes:
                raise InterruptedError

        before = sorted(ours.parent.iterdir())
        with pytest.raises(InterruptedError):
            convert(ConvertRequest(source=ours, out=ours.parent / "out", to=to), written=interrupt)
        assert sorted(ours.parent.iterdir()) == before

    @pytest.mark.parametrize("to", ["npy", "nanogpt"])
    def test_a_killed_conversion_can_be_repeated(self, ours: Path, to: str) -> None:
        out = ours.parent / "out"
        script = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from data_tools.formats.conversion import convert\n"
            "from data_tools.formats.plan import ConvertRequest\n"
            "request = ConvertRequest(source=Path(sys.argv[1]), out=Path(sys.argv[2]), to=sys.argv[3], workers=1)\n"
            "convert(request, written=lambda done_bytes: done_bytes and os.kill(os.getpid(), signal.SIGKILL))\n"
        )
        killed = subprocess.run(
            [sys.executable, "-c", script, ours, out, to], env=environment(), check=False, timeout=60
        )
        assert killed.returncode == -signal.SIGKILL
        assert not out.exists()
        assert len(list(ours.parent.iterdir())) == 2, "the killed process must leave something"
        convert(ConvertRequest(source=ours, out=out, to="llmc", shard_tokens=10_000))
        assert sorted(path.name for path in ours.parent.iterdir()) == ["ours", "out"]
        assert sorted(path.name for path in out.iterdir()) == [
            "manifest.json",
            "out_train_000001.bin",
            "out_val_000000.bin",
        ]
        assert open_collection(out).splits["train"].stream.tokens == documents(100).size + documents(50, 1).size

    def test_an_empty_folder_is_filled_and_another_is_left_alone(self, ours: Path) -> None:
        out = ours.parent / "out"
        out.mkdir()
        convert(ConvertRequest(source=ours, out=out, to="arrow"))
        verify(out)
        before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        with pytest.raises(DataError, match=r"--out \S*out is not empty \(it holds manifest\.json\)"):
            convert(ConvertRequest(source=ours, out=out, to="npy"))
        with pytest.raises(DataError, match=r"--out \S*manifest\.json is a file"):
            convert(ConvertRequest(source=ours, out=out / "manifest.json", to="npy"))
        assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before

    def test_a_damaged_folder_of_ours_is_not_given_new_hashes(self, ours: Path) -> None:
        put("train_000001.npy", 300, "<H", 7)(ours)
        with pytest.raises(DataError, match=r"train_000001\.npy: its SHA-256"):
            convert(ConvertRequest(source=ours, out=ours.parent / "out", to="arrow"))
        assert not (ours.parent / "out").exists()

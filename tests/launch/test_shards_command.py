"""``launch/shards.py`` as a user runs it; in this process if only its output matters."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import launch.shards
from launch.cli import run_command
from data_tools.shards.manifest import load_manifest
from data_tools.shards.reader import open_split
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from tests.support.runs import REPOSITORY, TINY_RUN, Sections, child_environment, curve_of, merged
from tests.support.token_files import write_llmc, write_megatron, write_ours

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]

TEXTS = ["The first document.", "A second one, " + "much longer. " * 40, "\x1b[31mred\x1b[0m\ttab, 漢字"]
VAL_TEXTS = ["For validation."]


def command(*arguments: object, **environment: str) -> Done:
    """Run ``launch/shards.py`` in a process of its own."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "launch" / "shards.py"), *map(str, arguments)],
        cwd=REPOSITORY,
        env={**child_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command in this process."""

    def run_here(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["shards.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command(launch.shards.main)
        assert isinstance(ended.value.code, int)
        return Done(sys.argv, ended.value.code, *capsys.readouterr())

    return run_here


def succeeded(done: Done) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout


def refused(done: Done, *pieces: str) -> None:
    """Check that the command ended with status 2 and one line that has these pieces."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for piece in pieces:
        assert piece in line


def tokens_of(texts: list[str]) -> np.ndarray:
    encode = load_tokenizer().encode
    return np.concatenate([[END_OF_TEXT, *encode(text)] for text in texts]).astype(np.uint16)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    write_ours(
        tmp_path / "ours", {"train": [tokens_of(TEXTS[:1]), tokens_of(TEXTS[1:])], "val": [tokens_of(VAL_TEXTS)]}
    )
    return tmp_path / "ours"


def test_from_nanogpt_to_a_folder_that_verifies(tmp_path: Path) -> None:
    """Inspect, read, convert and verify files of another program, each in a process of its own."""
    source, out = tmp_path / "openwebtext", tmp_path / "data" / "owt"
    source.mkdir()
    tokens_of(TEXTS).tofile(source / "train.bin")
    tokens_of(VAL_TEXTS).tofile(source / "val.bin")

    assert "format nanogpt" in succeeded(command("inspect", source))
    shown = succeeded(command("head", source, "--characters", 12, PYTHONIOENCODING="ascii"))
    assert shown.splitlines()[:4] == [
        f"--- train, document 0: {len(load_tokenizer().encode(TEXTS[0]))} tokens",
        "The first do [...]",
        f"--- train, document 1: {len(load_tokenizer().encode(TEXTS[1]))} tokens",
        "A second one [...]",
    ]

    written = succeeded(command("convert", source, "--to", "npy", "--out", out))
    assert re.search(r"train: [\d,]+ tokens, 3 documents, [\d,]+ bytes of text, 1 file\n", written)
    assert re.search(r"written 0\.0 MB in \d+\.\d s, [\d,]+ MB/s", written)
    verified = succeeded(command("verify", out))
    assert "all 2 shards match the manifest" in verified and re.search(r"[\d,]+ MB/s", verified)
    np.testing.assert_array_equal(open_split(out, "train").read(0, tokens_of(TEXTS).size), tokens_of(TEXTS))
    assert load_manifest(out).shards[0].utf8_bytes == sum(len(text.encode()) for text in TEXTS)


def test_training_from_llmcs_shards_in_place(run: Run, tmp_path: Path) -> None:
    """The loss curve equals that of the same tokens as npy."""
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, END_OF_TEXT, 3000).astype(np.uint16)
    write_llmc(folder / "fineweb_val_000000.bin", tokens[:700])
    write_llmc(folder / "fineweb_train_000001.bin", tokens[700:2000])
    write_llmc(folder / "fineweb_train_000002.bin", tokens[2000:])
    succeeded(run("convert", folder, "--out", tmp_path / "npy", "--to", "npy"))
    written = succeeded(run("convert", folder, "--in-place"))
    assert "manifest.json written" in written and "2,300 tokens" in written
    again = succeeded(run("convert", folder, "--in-place"))
    assert "already has a manifest.json; nothing is left to do" in again and "2,300 tokens" in again

    def losses(data: Path) -> list[float]:
        changes: Sections = {
            "data": {"path": str(data)},
            "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 16},
            "batch": {"tokens_per_step": 64},
            "schedule": {"warmup_steps": 1, "max_steps": 3},
        }
        return curve_of("ddp", tmp_path / f"run_{data.name}", merged(TINY_RUN, changes)).losses

    assert losses(folder) == losses(tmp_path / "npy")


def test_inspect_shows_a_table_and_json(run: Run, ours: Path) -> None:
    lines = succeeded(run("inspect", ours)).splitlines()
    heading = next(line for line in lines if line.lstrip().startswith("split"))
    train = next(line for line in lines if line.lstrip().startswith("train")).split()
    assert heading.split()[:6] == ["split", "shards", "tokens", "documents", "bytes", "bytes/token"]
    assert train[1:4] == ["2", f"{tokens_of(TEXTS).size:,}", "3"]
    report = json.loads(succeeded(run("inspect", ours, "--json")))
    assert report["splits"]["train"]["utf8_bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_head_escapes_control_characters_of_a_document(run: Run, ours: Path) -> None:
    shown = succeeded(run("head", ours, "--documents", 3))
    assert "\\x1b[31mred\\x1b[0m\ttab, 漢字" in shown and "\x1b" not in shown
    assert succeeded(run("head", ours, "--split", "val")).splitlines()[1:] == VAL_TEXTS
    assert succeeded(run("head", ours, "--documents", 1)).count("---") == 1


def test_megatron_with_the_split_named(run: Run, tmp_path: Path) -> None:
    for name in ("a_text_document", "b_text_document"):
        write_megatron(tmp_path / name, [[[1, 2]], [[3]]], append_eod=True)
    out = tmp_path / "out"
    splits = ("--split-of", "a_text_document=train", "b_text_document.idx=val")
    succeeded(run("convert", tmp_path, "--to", "arrow", "--out", out, *splits))
    assert open_split(out, "val").read(0, 5).tolist() == [END_OF_TEXT, 1, 2, END_OF_TEXT, 3]
    assert load_manifest(out).source.kind == "megatron"


def test_mistakes_are_one_line(run: Run, ours: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run("inspect", tmp_path / "nowhere"), "nowhere does not exist")
    refused(run("inspect", tmp_path), str(tmp_path), "--from says what it is")
    refused(run("verify", tmp_path), "has no manifest.json", "with gpt2-pipeline shards convert")
    refused(run("head", ours, "--split", "test"), "has no split 'test'; it has train, val")
    refused(run("head", ours, "--documents", "0"), "--documents", "a whole number from 1, it is '0'")
    refused(run("convert", ours), "give --out and --to, or --in-place")
    refused(run("convert", ours, "--out", out, "--to", "tfrecord"), "--to", "npy", "llmc")
    refused(
        run("convert", ours, "--out", out, "--to", "npy", "--split-of", "x=val"), "the manifest", "names its splits"
    )
    refused(run("convert", ours, "--out", out, "--to", "npy", "--split-of", "x"), "must be NAME=SPLIT, it is 'x'")
    refused(
        run("convert", ours, "--out", out, "--to", "nanogpt", "--shard-tokens", 5),
        "--shard-tokens",
        "one file per split",
    )
    refused(run("convert", ours, "--out", out, "--to", "npy", "--name", "x"), "--name is for --to llmc")
    refused(run("convert", ours, "--out", out, "--to", "llmc", "--name", "../x"), "--name", "'../x'")
    refused(run("convert", ours, "--in-place", "--out", out), "--in-place", "takes no --out")
    refused(run("convert", ours, "--in-place", "--split-of", "x=val"), "--split-of", "delete")
    refused(run("convert", ours, "--out", ours, "--to", "npy"), "is not empty")
    below_a_file = ours / "manifest.json" / "out"
    refused(
        run("convert", out / "nowhere", "--out", below_a_file, "--to", "npy"), "--out: cannot write", "may write to"
    )
    assert not out.exists()


def test_a_full_disk_is_one_line(run: Run, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    for to in ("npy", "nanogpt"):
        refused(run("convert", ours, "--out", tmp_path / "out", "--to", to), "cannot write", "No space left on device")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


@pytest.mark.parametrize("name", ["inspect", "verify", "head", "convert"])
def test_help_has_an_example(run: Run, name: str) -> None:
    shown = succeeded(run(name, "--help"))
    assert f"example:\n  gpt2-pipeline shards {name} " in shown

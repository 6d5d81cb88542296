"""Check the command line of stage 1."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from launch.cli import run_command
from data_tools.corpus.estimate import Estimate
from data_tools.shards.contents import Contents
from data_tools.shards.manifest import load_manifest
from launch import tokenize_progress
from launch.tokenize_corpus import main
from launch.tokenize_progress import ProgressDisplay
from tests.data_tools.conftest import (
    CHUNK_BYTES,
    Command,
    contents,
    documents_of,
    json_lines,
    sequential_tokens,
    tokens_of,
    varied_documents,
)


def test_it_prints_the_estimate_and_what_it_wrote_and_where(tmp_path: Path, run_process: Command) -> None:
    (tmp_path / "corpus.txt").write_text("one\n\ntwo\n\nthree")
    command = ["--source", "text", "--input", "corpus.txt", "--document-separator", r"\n\n", "--out", "data"]
    ended = run_process(*command, "--workers", 1)
    assert ended.returncode == 0, ended.stderr
    planned, warning = ended.stderr.splitlines()
    assert warning == (
        "warning: the validation split has 2 tokens in 1 document, 33.33% of all tokens; losses on fewer than 16,384 "
        "tokens are noisy: tokenize more text into another folder: 500,000 tokens in 200 documents suffice with "
        "--val-fraction 0.1"
    )
    assert planned.startswith("about 15 B of text, 8 tokens, 16 B on the disk (")
    assert " free); 1 chunk, 1 process, up to 367.0 MB of the " in planned
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("0.0 MB in ")
    assert lines[0].endswith(" MB/s")
    assert lines[1:] == [
        "data:",
        "  split  tokens  windows of 1,024  documents  bytes of text  npy shards",
        "  train       4                 0          2              6           1",
        "  val         2                 0          1              5           1",
        "  tokens per document:",
        f"            2 to           3:            3 {'#' * 40}",
    ]
    before = contents(tmp_path / "data")
    again = run_process(*command, "--workers", 2)
    assert again.stdout.splitlines() == ["data is already complete", *lines[1:5]]
    assert again.stderr.splitlines() == [warning]
    assert contents(tmp_path / "data") == before


def test_it_names_the_files_that_it_skips_once(tmp_path: Path, run_process: Command) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(json_lines(varied_documents(20)))
    (tmp_path / "corpus" / "b.xyz").touch()
    ended = run_process("--source", "jsonl", "--input", "corpus", "--out", "data", "--workers", 2)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines()[0] == "1 file with other endings skipped: .xyz (1)"
    assert ended.stderr.count("skipped") == 1


def test_without_validation_documents_it_warns(tmp_path: Path, run_process: Command) -> None:
    (tmp_path / "corpus.txt").write_text("one")
    ended = run_process("--source", "text", "--input", "corpus.txt", "--out", "data")
    assert ended.returncode == 0
    warning = ended.stderr.splitlines()[-1]
    assert warning.startswith("warning: no document was drawn for validation")
    assert "--document-separator" in warning
    assert load_manifest(tmp_path / "data").splits() == ("train",)
    # In a corpus of several chunks no document is moved to an empty split.
    (tmp_path / "a.jsonl").write_bytes(json_lines(varied_documents(20)))
    options = ["--source", "jsonl", "--input", "a.jsonl", "--out", "c", "--workers", 1, "--val-fraction", 1e-9]
    several = run_process(*options, "--shard-tokens", 500, chunk_bytes=CHUNK_BYTES)
    assert "8 chunks" in several.stderr
    warning = several.stderr.splitlines()[-1]
    assert warning.startswith("warning: no document was drawn for validation")
    assert warning.endswith("500,000 tokens in 200 documents suffice with --val-fraction 0.1")


def test_a_single_file_gets_a_validation_split(tmp_path: Path, run_process: Command) -> None:
    (tmp_path / "book.txt").write_text("A line of a book.\n" * 1000)
    ended = run_process("--source", "text", "--input", "book.txt", "--out", "data", "--val-fraction", 0.1)
    assert ended.returncode == 0, ended.stderr
    assert "the source is one document: its beginning is for training and its end for validation" in ended.stdout
    assert "warning: the validation split has 701 tokens in 1 document, 10.0" in ended.stderr
    manifest = load_manifest(tmp_path / "data")
    assert manifest.splits() == ("train", "val")
    assert sum(shard.utf8_bytes for shard in manifest.shards) == 18_000
    assert (manifest.report or {})["divided_documents"] == 1


def test_options_reach_the_shards(tmp_path: Path, run_process: Command, reference: tiktoken.Encoding) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n{"body": "one"}\n{"body": "four"}\n')
    ended = run_process(
        *["--source", "jsonl", "--input", "b.jsonl", "a.jsonl", "--text-field", "body", "--format", "arrow"],
        *["--val-fraction", 0, "--shard-tokens", 2, "--limit-documents", 4, "--workers", 2, "--out", "x/y"],
        *["--deduplicate", "exact", "--encoder", "tiktoken"],
    )
    assert ended.returncode == 0, ended.stderr
    assert "warning" not in ended.stderr, "no validation split was asked for"
    manifest = load_manifest(tmp_path / "x" / "y")
    assert [shard.file for shard in manifest.shards] == [f"train_00000_{index:03d}.arrow" for index in range(3)]
    np.testing.assert_array_equal(
        tokens_of(tmp_path / "x" / "y"), sequential_tokens(reference, ["three", "one", "four"])
    )
    assert ended.stdout.splitlines()[-1] == "  left out: 1 document that repeats an earlier one"
    assert manifest.made is not None
    assert manifest.made["encoder"].startswith("tiktoken")


def test_shares_of_the_work(tmp_path: Path, run_process: Command) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(varied_documents(20)))
    options = ["--source", "jsonl", "--input", "a.jsonl", "--shard-tokens", 500, "--workers", 1]
    first = run_process(*options, "--out", "out", "--task", 0, "--tasks", 2, chunk_bytes=CHUNK_BYTES)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "share 0 of 2 is done; the share that finishes last writes the manifest"
    last = run_process(*options, "--out", "out", "--task", 1, "--tasks", 2, chunk_bytes=CHUNK_BYTES)
    assert "out:\n  split " in last.stdout and "\n  train " in last.stdout
    assert documents_of(tmp_path / "out") == 20


def test_help_shows_an_example_and_the_defaults(run_process: Command) -> None:
    ended = run_process("--help")
    assert ended.returncode == 0
    assert "example:\n  gpt2-pipeline tokenize --source" in ended.stdout
    assert "(default: 100000000)" in ended.stdout
    assert "(default: one per core" in ended.stdout


# Progress


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(tokenize_progress.time, "monotonic", lambda: self.now_s)


ESTIMATE = Estimate(
    text_bytes=40_000_000,
    bytes_per_token=4.0,
    free_bytes=None,
    chunks=10,
    workers=2,
    memory_bytes=734_003_200,
    memory_limit_bytes=500_000_000,
)


def test_a_line_every_30_seconds_shows_the_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    display = ProgressDisplay()
    display.planned(ESTIMATE)
    assert capsys.readouterr().err == (
        "about 40.0 MB of text, 10,000,000 tokens, 20.0 MB on the disk; "
        "10 chunks, 2 processes, up to 734.0 MB of the 500.0 MB of memory\n"
    )
    display.progressed(Contents(0, 0, 0))
    clock.now_s += 10
    display.progressed(Contents(1000, 2_000_000, 9_000_000))
    assert capsys.readouterr().err == ""
    clock.now_s += 20
    display.progressed(Contents(1200, 2_500_000, 10_000_000))
    assert capsys.readouterr().err == "1,200 documents, 2,500,000 tokens, 0.3 MB/s, 01:30 left\n"
    clock.now_s += 29
    display.progressed(Contents(1300, 2_600_000, 11_000_000))
    assert capsys.readouterr().err == ""
    display.close()


def test_the_speed_excludes_what_an_interrupted_run_had_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    display = ProgressDisplay()
    display.progressed(Contents(500, 5_000_000, 20_000_000))
    assert capsys.readouterr().err == "continuing after 500 documents in finished shards\n"
    clock.now_s += 40
    display.progressed(Contents(600, 6_000_000, 24_000_000))
    assert capsys.readouterr().err == "600 documents, 6,000,000 tokens, 0.1 MB/s\n"  # without an estimate, no time left
    assert display.speed() == "0.1 MB/s"
    assert display.encoded_megabytes() == 4.0


def test_a_terminal_shows_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    display = ProgressDisplay()
    display.planned(ESTIMATE)
    display.progressed(Contents(0, 0, 0))
    display.progressed(Contents(1200, 2_500_000, 10_000_000))
    display.close()
    planned, *bar = terminal.getvalue().replace("\r", "\n").strip().splitlines()
    assert "1,200 documents, 2,500,000 tokens" in bar[-1]
    assert " left" in bar[-1]


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out data", "the following arguments are required: --source"),
        ("--source text --input a.txt", "the following arguments are required: --out"),
        ("--source nosuch --out data", "invalid choice: 'nosuch'"),
        ("--source text --out data", "--source text needs --input"),
        ("--source text --input nope.txt --out data", "--input nope.txt does not exist"),
        ("--source text --input nope/*.txt --out data", "--input nope/*.txt matches no file"),
        ("--source jsonl --input . --out data", "--input . holds no file that ends in .jsonl"),
        ("--source python-stdlib --input a.txt --out data", "--source python-stdlib takes no --input"),
        ("--source hf --input a b --out data", "--source hf takes one --input"),
        ("--source text --input a.txt --out data --format bin", "invalid choice: 'bin'"),
        ("--source text --input a.txt --out data --val-fraction 1", "--val-fraction must be at least 0 and below 1"),
        ("--source text --input a.txt --out data --val-fraction nan", "it is nan"),
        ("--source text --input a.txt --out data --val-fraction=-0.1", "it is -0.1"),
        ("--source text --input a.txt --out data --val-fraction x", "invalid float value: 'x'"),
        ("--source text --input a.txt --out data --shard-tokens 0", "--shard-tokens must be at least 1, it is 0"),
        ("--source text --input a.txt --out data --workers 0", "--workers must be at least 1, it is 0"),
        ("--source text --input a.txt --out data --workers two", "invalid int value: 'two'"),
        ("--source text --input a.txt --out data --seed=-1", "--seed must be at least 0 and below 2**64"),
        ("--source text --input a.txt --out data --limit-documents 0", "--limit-documents must be at least 1"),
        ("--source text --input a.txt --out data --encoder slow", "invalid choice: 'slow'"),
        ("--source text --input a.txt --out data --deduplicate near", "invalid choice: 'near'"),
        ("--source text --input a.txt --out data --ray-address x:1", "--ray-address needs --engine ray"),
        ("--source text --input a.txt --out data --task 1", "--task and --tasks go together"),
        ("--source text --input a.txt --out data --task 2 --tasks 2", "--task must be from 0 to 1 with --tasks 2, it"),
        (
            "--source text --input a.txt --out data --task 0 --tasks 0",
            "--tasks: must be a whole number from 1, it is '0'",
        ),
        ("--source text --input a.txt --out data --text-field body", "--source text takes no --text-field"),
        ("--source text --input a.txt --out a.txt", "--out a.txt is a file; name a folder"),
        ("--source text --input a.txt --out .", "--out . is not empty (it holds a.txt)"),
        ("--source text --input a.txt --out nosuch://a", "cannot use nosuch://a: "),
        ("--source text --input nosuch://a --out data", "cannot read nosuch://a: "),
        ("--source text --input bad.txt --out data", "bad.txt: byte 3 (0xff) is not valid UTF-8"),
        ("--source text --input empty.txt --out data", "no document with text in it"),
        ("--source jsonl --input a.txt --out data", "a.txt:1: not valid JSON"),
        ("--source parquet --input a.txt --out data", "cannot read a.txt: "),
        ("--source text --input a.txt --out data --shard 5", "unrecognized arguments: --shard 5"),
    ],
)
def test_a_wrong_command_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tokenize_corpus.py", *arguments.split()])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "empty.txt").write_text("")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run_command(main)
    assert exit.value.code == 2
    check_one_line(*capsys.readouterr(), message)
    assert contents(tmp_path) == before
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--source text --input nope.txt --out data", "--input nope.txt does not exist"),
        ("--source hf --input ./nope --out data", "cannot read dataset ./nope"),
    ],
)
def test_a_real_process_ends_with_one_line_too(
    tmp_path: Path, run_process: Command, arguments: str, message: str
) -> None:
    ended = run_process(*arguments.split())
    assert ended.returncode == 2
    check_one_line(ended.stdout, ended.stderr, message)
    assert list(tmp_path.iterdir()) == []


def test_workers_that_cannot_be_started_are_one_line(
    tmp_path: Path, run_process: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / ("x" * 100)  # too long for the name of a socket
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    (tmp_path / "a.jsonl").write_bytes(json_lines(varied_documents(20)))
    options = ["--source", "jsonl", "--input", "a.jsonl", "--shard-tokens", 500, "--out", "data"]
    refused = run_process(*options, "--workers", 2, chunk_bytes=CHUNK_BYTES)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: cannot start a worker process: ")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "data").exists()


def check_one_line(output: str, errors: str, message: str) -> None:
    assert output == ""
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("error: ")
    assert message in errors

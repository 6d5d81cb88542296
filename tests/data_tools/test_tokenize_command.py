"""The command line of stage 1, as a user meets it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data_tools.shards import load_manifest
from launch.cli import run_command
from launch.tokenize_corpus import main
from tests.data_tools.conftest import Command, contents, sequential_tokens, tokens_of


def test_it_says_what_it_wrote_and_where(tmp_path: Path, run_process: Command) -> None:
    (tmp_path / "corpus.txt").write_text("one\n\ntwo\n\nthree")
    command = ["--source", "text", "--input", "corpus.txt", "--document-separator", r"\n\n", "--out", "data"]
    result = run_process(*command, "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "data:"
    assert lines[1] == "  train: 4 tokens, 2 documents, 6 bytes of text, 1 npy shards"
    assert lines[2] == "  val: 2 tokens, 1 documents, 5 bytes of text, 1 npy shards"
    assert "MB/s" in lines[3]
    before = contents(tmp_path / "data")
    again = run_process(*command, "--workers", 2)
    assert again.stdout.splitlines() == ["data is already complete", *lines[:3]]
    assert contents(tmp_path / "data") == before


def test_a_single_document_warns_of_the_missing_validation_split(tmp_path: Path, run_process: Command) -> None:
    (tmp_path / "corpus.txt").write_text("one")
    result = run_process("--source", "text", "--input", "corpus.txt", "--out", "data")
    assert result.returncode == 0
    assert result.stderr.startswith("warning: a single document cannot be divided")
    assert "--document-separator" in result.stderr
    assert load_manifest(tmp_path / "data").splits() == ("train",)
    quiet = run_process("--source", "text", "--input", "corpus.txt", "--out", "b", "--val-fraction", 0)
    assert quiet.stderr == ""


def test_options_reach_the_shards(tmp_path: Path, run_process: Command, reference: tiktoken.Encoding) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n{"body": "four"}\n')
    result = run_process(
        *["--source", "jsonl", "--input", "b.jsonl", "a.jsonl", "--text-field", "body", "--format", "arrow"],
        *["--val-fraction", 0, "--shard-tokens", 2, "--limit-documents", 3, "--workers", 2, "--out", "x/y"],
    )
    assert result.returncode == 0, result.stderr
    shards = load_manifest(tmp_path / "x" / "y").shards
    assert [shard.file for shard in shards] == [f"train_{index:06d}.arrow" for index in range(3)]
    expected = sequential_tokens(reference, ["three", "four", "one"])
    np.testing.assert_array_equal(tokens_of(tmp_path / "x" / "y"), expected)


def test_help_shows_an_example_and_the_defaults(run_process: Command) -> None:
    result = run_process("--help")
    assert result.returncode == 0
    assert "example:\n  python launch/tokenize_corpus.py --source" in result.stdout
    assert "(default: 100000000)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out data", "the following arguments are required: --source"),
        ("--source text --input a.txt", "the following arguments are required: --out"),
        ("--source csv --out data", "invalid choice: 'csv'"),
        ("--source text --out data", "--source text needs --input"),
        ("--source text --input nope.txt --out data", "--input nope.txt does not exist"),
        ("--source text --input nope/*.txt --out data", "--input nope/*.txt matches no file"),
        ("--source jsonl --input . --out data", "--input . holds no file that ends in .jsonl"),
        ("--source python-stdlib --input a.txt --out data", "--source python-stdlib takes no --input"),
        ("--source hf --input a b --out data", "--source hf takes one --input"),
        ("--source text --input a.txt --out data --format bin", "invalid choice: 'bin'"),
        (
            "--source text --input a.txt --out data --val-fraction 1",
            "--val-fraction must be at least 0 and below 1",
        ),
        ("--source text --input a.txt --out data --val-fraction nan", "it is nan"),
        ("--source text --input a.txt --out data --val-fraction=-0.1", "it is -0.1"),
        ("--source text --input a.txt --out data --val-fraction x", "invalid float value: 'x'"),
        (
            "--source text --input a.txt --out data --shard-tokens 0",
            "--shard-tokens must be at least 1, it is 0",
        ),
        ("--source text --input a.txt --out data --workers 0", "--workers must be at least 1, it is 0"),
        ("--source text --input a.txt --out data --workers two", "invalid int value: 'two'"),
        ("--source text --input a.txt --out data --seed=-1", "--seed must be at least 0 and below 2**64"),
        (
            "--source text --input a.txt --out data --limit-documents 0",
            "--limit-documents must be at least 1",
        ),
        ("--source text --input a.txt --out data --text-field body", "--source text takes no --text-field"),
        ("--source text --input a.txt --out a.txt", "--out a.txt is a file; name a folder"),
        ("--source text --input a.txt --out .", "--out . is not empty (it holds a.txt)"),
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
    result = run_process(*arguments.split())
    assert result.returncode == 2
    check_one_line(result.stdout, result.stderr, message)
    assert contents(tmp_path) == {}


def check_one_line(output: str, errors: str, message: str) -> None:
    assert output == ""
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("error: ")
    assert message in errors

"""Define the groups of inputs for stage 1 and for evaluation files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import launch.evaluate
import launch.shards
import launch.tokenize_corpus
import launch.train
from benchmarks.fuzz.trial import Command, Group, call
from data_tools.shards import verify
from tests.support.token_files import documents, write_llmc, write_megatron, write_ours

_TEXTS = [
    "The first document has one line.\n",
    "A second document, " + "which repeats itself, " * 20 + "and ends.\n\nNew paragraph.\n",
    "漢字 and é and 🙂, three scripts in one line\n",
    *(f"Document {number} of many: {'word ' * number}\n" for number in range(3, 12)),
]
_CHAT = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}
_INSTRUCTIONS = [
    *({"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(6)),
    *[_CHAT] * 2,
]
_CHOICES = [{"query": f"{n} plus 1 is", "choices": [str(n), str(n + 1)], "gold": 1} for n in range(4)]
_CONTINUATIONS = [{"context": "One, two,", "continuation": " three"}, {"context": "A", "continuation": "b c"}]
_PIQA = [{"goal": "To open a door,", "sol1": "push it", "sol2": "eat it", "label": 0}] * 3
_LAMBADA = [{"text": text} for text in ("He opened the door", "She read the book")]

_SHOWN = ("inspect {source}", "inspect {source} --json", "head {source}")
_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


def _tokenize(options: str) -> Command:
    return Command(launch.tokenize_corpus.main, f"{options} --out {{out}} --workers 1 --val-fraction 0.2", check=verify)


def _shards(line: str, check: Callable[[Path], object] | None = None) -> Command:
    return Command(launch.shards.main, line, check=check)


def _lines(rows: Sequence[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _write_texts(source: Path, fixed: Path) -> None:
    for suffix, compress in _COMPRESS.items():
        for number, text in enumerate(_TEXTS[:4]):
            (source / f"{number}.txt{suffix}").write_bytes(compress(text.encode()))


def _write_jsonl(source: Path, fixed: Path) -> None:
    rows = [{"text": text, "id": number} for number, text in enumerate(_TEXTS)]
    for suffix, compress in _COMPRESS.items():
        (source / f"rows.jsonl{suffix}").write_bytes(compress(_lines(rows)))


def _write_instructions(source: Path, fixed: Path) -> None:
    for suffix, compress in _COMPRESS.items():
        (source / f"lines.jsonl{suffix}").write_bytes(compress(_lines(_INSTRUCTIONS)))
        (source / f"array.json{suffix}").write_bytes(compress(json.dumps(_INSTRUCTIONS).encode()))


def _table() -> pa.Table:
    return pa.table({"text": _TEXTS, "id": list(range(len(_TEXTS)))})


def _write_parquet(source: Path, fixed: Path) -> None:
    for compression in ("snappy", "zstd", "none"):
        pq.write_table(_table(), source / f"{compression}.parquet", row_group_size=5, compression=compression)


def _write_saved_dataset(source: Path, fixed: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(_table()).save_to_disk(str(source / "saved"))


def _write_saved_dict(source: Path, fixed: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.DatasetDict({"train": datasets.Dataset(_table()), "test": datasets.Dataset(_table())})
    saved.save_to_disk(str(source / "saved"))


def _write_hub_folder(source: Path, fixed: Path) -> None:
    _write_parquet(source, fixed)


def _write_shards(format: str) -> Callable[[Path, Path], None]:
    def make(source: Path, fixed: Path) -> None:
        source.rmdir()
        write_ours(source, {"train": [documents(9), documents(5, 1)], "val": [documents(3, 2)]}, format)

    return make


def _write_masked(source: Path, fixed: Path) -> None:
    (fixed / "lines.jsonl").write_bytes(_lines(_INSTRUCTIONS))
    _succeed(launch.tokenize_corpus.main, f"--source instructions --input {fixed} --out {source} --workers 1")


def _write_unfinished(source: Path, fixed: Path) -> None:
    for number in range(3):
        (fixed / f"{number}.jsonl.gz").write_bytes(gzip.compress(_lines([{"text": text * 3} for text in _TEXTS]) * 400))
    _succeed(launch.tokenize_corpus.main, f"--source jsonl --input {fixed} --out {source} --task 0 --tasks 2")


def _write_nanogpt(source: Path, fixed: Path) -> None:
    documents(20).tofile(source / "train.bin")
    documents(5, 1).tofile(source / "val.bin")


def _write_llmc(source: Path, fixed: Path) -> None:
    write_llmc(source / "fineweb_train_000001.bin", documents(20))
    write_llmc(source / "fineweb_val_000000.bin", documents(5, 1))


def _write_build_nanogpt(source: Path, fixed: Path) -> None:
    np.save(source / "edufineweb_train_000001.npy", documents(20))
    np.save(source / "edufineweb_val_000000.npy", documents(5, 1))


def _write_megatron(source: Path, fixed: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 50256, (6, 3, 4)).tolist()
    write_megatron(source / "x_text_document", tokens, append_eod=True)


def _write_examples(source: Path, fixed: Path) -> None:
    (source / "choices.jsonl").write_bytes(_lines(_CHOICES))
    (source / "continuations.jsonl").write_bytes(_lines(_CONTINUATIONS))
    (source / "piqa.jsonl").write_bytes(_lines(_PIQA))
    (source / "lambada.jsonl").write_bytes(_lines(_LAMBADA))
    (source / "book.txt").write_text("".join(_TEXTS))
    pq.write_table(pa.Table.from_pylist(_CHOICES), source / "choices.parquet")
    write_tiny_run(fixed)


def write_tiny_run(folder: Path) -> None:
    """Train a tiny GPT-2 for one step. Writes the run ``run``, the dataset ``data`` and the config ``run.json``."""
    write_ours(folder / "data", {"train": [documents(20)], "val": [documents(5, 1)]})
    config = {
        "run": {"precision": "fp32", "device": "cpu", "compile": False, "out_dir": str(folder / "run")},
        "model": {"preset": "gpt2-tiny", "n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 32},
        "data": {"path": str(folder / "data")},
        "batch": {"tokens_per_step": 64, "micro_batch_size": 2},
        "schedule": {"warmup_steps": 0, "max_steps": 1},
        "evaluation": {"max_batches": 1},
        "logging": {"sinks": ["jsonl", "console"]},
    }
    (folder / "run.json").write_text(json.dumps(config))
    _succeed(launch.train.main, f"--config {folder / 'run.json'}")


def _succeed(main: Callable[[], object], line: str) -> None:
    status, errors, unexpected = call(main, line.split())
    assert status == 0, unexpected or errors


def _evaluate(task: str, file: str) -> Command:
    return Command(
        launch.evaluate.main, f"--checkpoint {{fixed}}/run --tasks {task} --data {task}={{source}}/{file} --device cpu"
    )


_CONVERT = "convert {{source}} --out {{out}} --to {to}{options}"


def _converted(to: str, options: str = "") -> Command:
    return _shards(_CONVERT.format(to=to, options=options), None if to == "nanogpt" else verify)


DATA_GROUPS = (
    Group(
        "text",
        _write_texts,
        (
            _tokenize("--source text --input {source}"),
            _tokenize(r"--source text --input {source} --document-separator \n"),
        ),
    ),
    Group(
        "jsonl",
        _write_jsonl,
        (
            _tokenize("--source jsonl --input {source}"),
            _tokenize("--source jsonl --input {source} --deduplicate exact --limit-documents 20"),
        ),
    ),
    Group("instructions", _write_instructions, (_tokenize("--source instructions --input {source}"),)),
    Group("parquet", _write_parquet, (_tokenize("--source parquet --input {source}"),)),
    Group("saved-dataset", _write_saved_dataset, (_tokenize("--source hf --input {source}/saved"),)),
    Group("saved-dict", _write_saved_dict, (_tokenize("--source hf --input {source}/saved"),)),
    Group("hf-folder", _write_hub_folder, (_tokenize("--source hf --input {source}"),)),
    *(
        Group(
            f"{format}-shards",
            _write_shards(format),
            (*map(_shards, (*_SHOWN, "verify {source}")), _converted(other), _converted("llmc")),
        )
        for format, other in (("npy", "arrow"), ("arrow", "npy"))
    ),
    Group("masked-shards", _write_masked, (_shards("verify {source}"), _converted("npy"))),
    Group(
        "unfinished",
        _write_unfinished,
        (
            Command(
                launch.tokenize_corpus.main,
                "--source jsonl --input {fixed} --out {source} --workers 1",
                continues_in_source=True,
            ),
        ),
    ),
    Group("nanogpt", _write_nanogpt, (*map(_shards, _SHOWN), _converted("npy"), _converted("npy", " --from nanogpt"))),
    Group("llmc", _write_llmc, (*map(_shards, _SHOWN), _converted("npy"), _shards("convert {source} --in-place"))),
    Group(
        "build-nanogpt",
        _write_build_nanogpt,
        (*map(_shards, _SHOWN), _converted("npy", " --from npy"), _shards("convert {source} --in-place")),
    ),
    Group("megatron", _write_megatron, (*map(_shards, _SHOWN), _converted("arrow"), _converted("nanogpt"))),
    Group(
        "examples",
        _write_examples,
        (
            _evaluate("mine", "choices.jsonl"),
            _evaluate("mine", "continuations.jsonl"),
            _evaluate("mine", "choices.parquet"),
            _evaluate("piqa", "piqa.jsonl"),
            _evaluate("lambada", "lambada.jsonl"),
            _evaluate("mine", "book.txt"),
        ),
    ),
)

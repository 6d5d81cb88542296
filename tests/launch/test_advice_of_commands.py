"""The advice of every command cures: each mistake is made, the advice is read from what is printed and followed.

All commands run in this process, which saves the seconds that a new process takes to start.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import launch.checkpoint
import launch.doctor
import launch.evaluate
import launch.export
import launch.generate
import launch.plan
import launch.report
import launch.shards
import launch.tokenize_corpus
from launch.cli import run_command
from tests.pipeline.interop.hugging_face.conftest import random_text_model, save_in_pieces, text_config
from tests.support.token_files import write_llmc, write_ours

MODULES = {
    "checkpoint": launch.checkpoint,
    "doctor": launch.doctor,
    "evaluate": launch.evaluate,
    "export": launch.export,
    "generate": launch.generate,
    "plan": launch.plan,
    "report": launch.report,
    "shards": launch.shards,
    "tokenize": launch.tokenize_corpus,
}
CHECKPOINT = "run/checkpoints/step_00000007"
WIDE = "A text of two bytes per character.\n"
TEXTS = ["One text.\n", "Another text, which is longer.\n", "A third text.\n", "The last text.\n"]


@dataclass(frozen=True)
class Case:
    """A mistake, and the advice against it.

    Attributes:
        wrong: commands, the last of which shows the advice.
        advice: a pattern for the advice.
        mended: commands that follow the advice, with the groups of the pattern in them.
        is_warning: whether the command with the advice succeeds.
    """

    wrong: list[str]
    advice: str
    mended: list[str] = field(default_factory=list)
    is_warning: bool = False


T, JSONL = "tokenize --workers 1 --val-fraction 0.5 --out out", "--source jsonl --input"
TEXT = f"{T} --source text --input"
TOKENIZED = f"{TEXT} docs.txt"
E = "evaluate --device cpu --checkpoint run --tasks"
G = "generate --device cpu --checkpoint run --max-new-tokens 1"
P = "plan --config good.json --backends ddp --set model.preset=gpt2-tiny batch.tokens_per_step=65536"
PLAN = f"{P} --world-size 4"

CASES: dict[str, Case] = {
    # Tokenize
    "no input": Case([f"{T} --source text"], r"needs (--input)", [rf"{T} --source text \1 docs.txt"]),
    "an option of other sources": Case(
        [f"{TEXT} body.jsonl --text-field body"],
        r"takes no --text-field; (\w+), parquet, hf, fineweb-edu do",
        [rf"{T} --source \1 --input body.jsonl --text-field body"],
    ),
    "an option of one other source": Case(
        [f"{T} {JSONL} docs.txt --document-separator x"],
        r"only (\w+) does",
        [rf"{T} --source \1 --input docs.txt --document-separator x"],
    ),
    "another field": Case(
        [f"{T} {JSONL} body.jsonl"],
        r"fields are (\w+); choose one with (--text-field)",
        [rf"{T} {JSONL} body.jsonl \2 \1"],
    ),
    "another column": Case(
        [f"{T} --source parquet --input table.parquet"],
        r"columns are (\w+); choose one with (--text-field)",
        [rf"{T} --source parquet --input table.parquet \2 \1"],
    ),
    "chats": Case([f"{T} {JSONL} chats.jsonl"], r"--source (\w+) reads", [rf"{T} --source \1 --input chats.jsonl"]),
    "chats as lists": Case(
        [f"{T} {JSONL} lists.jsonl"], r"--source (\w+) reads", [rf"{T} --source \1 --input lists.jsonl"]
    ),
    "compressed, without the ending": Case(
        [f"{T} {JSONL} packed.jsonl"],
        r"(packed\.jsonl) is compressed by gzip; .*end in (\.gz)",
        [r"mv \1 \1\2", rf"{T} {JSONL} \1\2"],
    ),
    "compressed, without the ending, decompressed": Case(
        [f"{T} {JSONL} packed.jsonl"], r"; (decompress) it", [r"\1 packed.jsonl", f"{T} {JSONL} packed.jsonl"]
    ),
    "an ending, not compressed": Case(
        [f"{T} {JSONL} plain.jsonl.gz"], r"; rename it", ["mv plain.jsonl.gz plain.jsonl", f"{T} {JSONL} plain.jsonl"]
    ),
    "Parquet as text": Case(
        [f"{TEXT} table.parquet"],
        r"--source (\w+) reads it",
        [rf"{T} --source \1 --input table.parquet --text-field body"],
    ),
    "Arrow as text": Case(
        [f"{TEXT} saved/one/data-00000-of-00001.arrow"],
        r"give its folder to (--source hf)",
        [rf"{T} \1 --input saved/one"],
    ),
    "another split of a dataset": Case(
        [f"{T} --source hf --input saved"],
        r"has no split 'train'; it has (\w+)",
        [rf"{T} --source hf --input saved --dataset-split \1"],
    ),
    "UTF-16": Case([f"{TEXT} wide.txt"], r"save it as (UTF-8)", [r"recode wide.txt", f"{TEXT} wide.txt"]),
    "a tar archive": Case([f"{TEXT} all.tar"], r"extract the files in it", ["untar all.tar", f"{TEXT} member.txt"]),
    "a file as folder": Case(
        [TOKENIZED.replace("--out out", "--out table.parquet")], r"is a file; name a folder", [TOKENIZED]
    ),
    "a folder that is not empty": Case(
        [TOKENIZED.replace("--out out", "--out odd")],
        r"name a new or empty folder",
        [TOKENIZED],
    ),
    "another request, another folder": Case(
        [TOKENIZED, f"{TOKENIZED} --seed 1"],
        r"name another --out",
        [f"{TOKENIZED} --seed 1".replace("--out out", "--out other")],
    ),
    "another request, the same folder": Case(
        [TOKENIZED, f"{TOKENIZED} --seed 1"], r"delete (\S+) to start again", [r"rm \1", f"{TOKENIZED} --seed 1"]
    ),
    "a damaged plan": Case(
        [TOKENIZED, "mv out/manifest.json out/plan.json", "damage out/plan.json", TOKENIZED],
        r"delete (\S+) and start again",
        [r"rm \1", TOKENIZED],
    ),
    "a missing shard": Case(
        [TOKENIZED, "rm out/train_00000_000.npy", TOKENIZED],
        r"delete the folder and tokenize again",
        ["rm out", TOKENIZED],
    ),
    "a share without shares": Case(
        [f"{TOKENIZED} --task 0"], r"go together, as (--task 0 --tasks 8)", [rf"{TOKENIZED} \1"]
    ),
    "a share out of range": Case(
        [f"{TOKENIZED} --task 2 --tasks 2"], r"from 0 to (\d) with", [rf"{TOKENIZED} --task \1 --tasks 2"]
    ),
    "a negative seed": Case([f"{TOKENIZED} --seed -1"], r"--seed must be at least (\d)", [rf"{TOKENIZED} --seed \1"]),
    "no document for validation": Case(
        [f"{T} --source instructions --input one.jsonl"],
        r"no document was drawn for validation.* tokenize more documents into another folder",
        [f"{T} --source instructions --input one.jsonl chats.jsonl".replace("--out out", "--out other")],
        is_warning=True,
    ),
    "thoughts of a chat": Case(
        [f"{T} --source instructions --input thinking.jsonl"],
        r"thinking of message 1 is not read; write it into the content, or remove it",
        [f"{T} --source instructions --input chats.jsonl"],
    ),
    # Shards
    "tokens of an unknown format": Case(
        ["shards inspect raw/a.bin"],
        r"--from says what it is \(native, (\w+)",
        [r"shards inspect raw/a.bin --from \1"],
    ),
    "a conversion to nowhere": Case(
        ["shards convert data"], r"give (--out) and (--to)", [r"shards convert data \1 out \2 arrow"]
    ),
    "a conversion to nowhere, in place": Case(["shards convert llmc"], r"or (--in-place)", [r"shards convert llmc \1"]),
    "files of unknown splits": Case(
        ["shards convert raw --from nanogpt --to npy --out out"],
        r"add (--split-of \S+=train)",
        [r"shards convert raw --from nanogpt --to npy --out out \1 b.bin=val"],
    ),
    "a split that does not exist": Case(
        ["shards head data --split test"], r"it has (\w+)", [r"shards head data --split \1"]
    ),
    "an option of copies": Case(
        ["shards convert llmc --in-place --out out"], r"takes no (--out)", ["shards convert llmc --in-place"]
    ),
    "a format that cannot stay": Case(
        ["shards convert nano --in-place"],
        r"convert the others with (--to) and (--out)",
        [r"shards convert nano \1 npy \2 out"],
    ),
    "new shards": Case(
        [
            "shards convert llmc --in-place",
            "cp llmc/a_train_0.bin llmc/a_train_1.bin",
            "shards convert llmc --in-place",
        ],
        r"delete (\S+) and repeat the command",
        [r"rm \1", "shards convert llmc --in-place"],
    ),
    "shards of nanoGPT": Case(
        ["shards convert data --to nanogpt --out out --shard-tokens 5"],
        r"(--shard-tokens): nanoGPT reads one file per split",
        ["shards convert data --to nanogpt --out out"],
    ),
    "a name for npy": Case(
        ["shards convert data --to npy --out out --name x"],
        r"--name is for (--to llmc)",
        [r"shards convert data \1 --out out --name x"],
    ),
    "a lost mask": Case(
        [
            "tokenize --workers 1 --source instructions --input chats.jsonl --val-fraction 0 --out masked",
            "shards convert masked --to nanogpt --out out",
        ],
        r"(--to npy) or arrow without --shard-tokens",
        [r"shards convert masked \1 --out out"],
    ),
    "no manifest": Case(
        ["shards verify empty"],
        r"make one with gpt2-pipeline (\w+)",
        [r"\1 --workers 1 --source text --input docs.txt --out empty", "shards verify empty"],
    ),
    "a damaged shard": Case(
        [TOKENIZED, "damage out/train_00000_000.npy", "shards verify out"],
        r"delete the folder and tokenize again",
        ["rm out", TOKENIZED, "shards verify out"],
    ),
    "a damaged manifest": Case(
        [TOKENIZED, "damage out/manifest.json", "shards inspect out"],
        r"delete the folder and tokenize again",
        ["rm out", TOKENIZED, "shards inspect out"],
    ),
    "an empty file": Case(
        ["touch nano/val.bin", "shards inspect nano"],
        r"(nano/val\.bin) has no .* or remove it",
        [r"rm \1", "shards inspect nano"],
    ),
    "characters of nanoGPT": Case(
        ["shards inspect characters"],
        r"tokenize the text with gpt2-pipeline (\w+)",
        [r"\1 --workers 1 --source text --input docs.txt --out out"],
    ),
    # Evaluate
    "no such task": Case([f"{E} own"], r"with (--data own)=FILE", [rf"{E} own \1=choices.jsonl"]),
    "data of no task": Case(
        [f"{E} validation --data own=choices.jsonl validation=data"],
        r"(own) is not among --tasks validation; add it there",
        [rf"{E} validation \1 --data own=choices.jsonl validation=data"],
    ),
    "a limit of validation": Case(
        [f"{E} validation --data validation=data --limit validation=2"],
        r"--limit validation: .*leave it out",
        [f"{E} validation --data validation=data"],
    ),
    "shots of validation": Case(
        [f"{E} validation --data validation=data --shots 1"],
        r"or name other (--tasks)",
        [f"{E} own --data own=choices.jsonl --shots 1"],
    ),
    "examples of validation": Case(
        [f"{E} validation --data validation=data --save-examples examples.jsonl"],
        r"leave it out, or",
        [f"{E} validation --data validation=data"],
    ),
    "examples in no folder": Case(
        [f"{E} own --data own=choices.jsonl --save-examples no/examples.jsonl"],
        r"give a file in a folder that exists",
        [f"{E} own --data own=choices.jsonl --save-examples examples.jsonl"],
    ),
    "data without a validation split": Case(
        ["shards convert llmc --in-place", f"{E} validation --data validation=llmc"],
        r"name a folder that has one with (--data validation)=DIR",
        [rf"{E} validation \1=data"],
    ),
    "no data": Case(
        [f"{E} validation"],
        r"(does not exist); make one with gpt2-pipeline tokenize",
        [f"{TOKENIZED}", f"{E} validation --data validation=out"],
    ),
    "compressed examples": Case(
        [f"{E} own --data own=choices.jsonl.gz"],
        r"(choices\.jsonl)\.gz is compressed; decompress it",
        [r"gunzip \1.gz", rf"{E} own --data own=\1"],
    ),
    "a task twice": Case(
        [f"{E} own own --data own=choices.jsonl"],
        r"(own) is given more than once; give it once",
        [rf"{E} \1 --data own=choices.jsonl"],
    ),
    "a stride of choices": Case(
        [f"{E} own --data own=choices.jsonl --stride 3"], r"leave it out", [f"{E} own --data own=choices.jsonl"]
    ),
    "shots of a text": Case(
        [f"{E} own --data own=docs.txt --shots 1"], r"leave it out", [f"{E} own --data own=docs.txt"]
    ),
    "a stride that skips": Case(
        [f"{E} own --data own=docs.txt --stride 999"],
        r"the model's context is (\d+)",
        [rf"{E} own --data own=docs.txt --stride \1"],
    ),
    "a long continuation": Case(
        [f"{E} own --data own=long.jsonl"],
        r"give it as a text, which is scored in windows",
        [f"{E} own --data own=long.txt"],
    ),
    "too many shots": Case(
        [f"{E} own --data own=choices.jsonl --shots 9"],
        r"there are only (\d) examples",
        [rf"{E} own --data own=choices.jsonl --shots \1"],
    ),
    "no network": Case([f"{E} piqa"], r"give a file with (--data)", [rf"{E} piqa \1 piqa=choices.jsonl"]),
    "columns of no protocol": Case(
        [f"{E} own --data own=body.jsonl"], r"expected (query, choices, gold)", [f"{E} own --data own=choices.jsonl"]
    ),
    "results in a file": Case(
        [f"{E} own --data own=choices.jsonl --out docs.txt"],
        r"is a file; name a folder",
        [f"{E} own --data own=choices.jsonl --out results"],
    ),
    "shards as a checkpoint": Case(
        [f"{E} own --data own=choices.jsonl".replace("run", "data")],
        r"is the manifest of token shards, not of a checkpoint; give another checkpoint, or the run folder",
        [f"{E} own --data own=choices.jsonl"],
    ),
    "no checkpoint": Case(
        [f"{E} own --data own=choices.jsonl".replace("run", "empty")],
        r"expected a (run) folder with checkpoints/",
        [f"{E} own --data own=choices.jsonl"],
    ),
    "a damaged checkpoint": Case(
        [
            f"cp {CHECKPOINT} run/checkpoints/step_00000009",
            "damage run/checkpoints/step_00000009/state.json",
            f"{E} own --data own=choices.jsonl".replace("run", "run/checkpoints/step_00000009"),
        ],
        r"or the run folder for its newest good one",
        [f"{E} own --data own=choices.jsonl"],
    ),
    "a limit below 1": Case(
        [f"{E} own --data own=choices.jsonl --limit 0"],
        r"a whole number from (\d)",
        [rf"{E} own --data own=choices.jsonl --limit \1"],
    ),
    # Generate
    "prompts from two places": Case(
        [f"{G} --interactive --prompt Hello"], r"give only one of the two", [f"{G} --prompt Hello"]
    ),
    "a system without a chat": Case(
        [f"{G} --prompt Hello --system Short."], r"add (--chat), or", [rf"{G} \1 --prompt Hello --system Short."]
    ),
    "a system without a chat, left out": Case(
        [f"{G} --prompt Hello --system Short."], r"or leave out --system", [f"{G} --prompt Hello"]
    ),
    "a system for single instructions": Case(
        [f"{G} --chat instruction --prompt Hello --system Short."],
        r"; leave out --system",
        [f"{G} --chat instruction --prompt Hello"],
    ),
    "a negative temperature": Case(
        [f"{G} --prompt Hello --temperature=-1"],
        r"must be a number from (\d)",
        [rf"{G} --prompt Hello --temperature \1"],
    ),
    # Export and import
    "an export to a full folder": Case(
        ["export --checkpoint run --out odd"], r"name another one", ["export --checkpoint run --out exported"]
    ),
    "a type for an import": Case(
        ["export --checkpoint run --out exported", "export --from-hf exported --out imported --dtype bfloat16"],
        r"(--dtype): only for exporting",
        ["export --from-hf exported --out imported"],
    ),
    "an import of nothing": Case(
        ["export --checkpoint run --out exported", "export --from-hf ./nothing --out imported"],
        r"expected one with config\.json",
        ["export --from-hf exported --out imported"],
    ),
    "an import into a run": Case(
        ["export --checkpoint run --out exported", "export --from-hf exported --out run"],
        r"name another folder",
        ["export --from-hf exported --out imported"],
    ),
    # Checkpoints
    "a conversion into a run": Case(
        ["checkpoint convert run --out run"], r"name another folder", ["checkpoint convert run --out other"]
    ),
    "a conversion into a folder of others": Case(
        ["checkpoint convert run --out data"], r"name a folder for the new run", ["checkpoint convert run --out other"]
    ),
    "scoring an export": Case(
        ["export --checkpoint run --out 'my export'", "evaluate --device cpu --checkpoint 'my export'"],
        r"the folder holds a Hugging Face model; import it with gpt2-pipeline (\w+) (--from-hf 'my export') --out RUN",
        [r"\1 \2 --out imported", "evaluate --device cpu --checkpoint imported --tasks own --data own=choices.jsonl"],
    ),
    "pruning a checkpoint": Case(
        [f"checkpoint prune {CHECKPOINT} --keep 1"],
        r"give the run folder that holds it",
        ["checkpoint prune run --keep 1"],
    ),
    "inspecting nothing": Case(["checkpoint inspect empty"], r"expected a (run) folder", [r"checkpoint inspect \1"]),
    "inspecting a damaged checkpoint": Case(
        [
            f"cp {CHECKPOINT} run/checkpoints/step_00000009",
            "damage run/checkpoints/step_00000009/state.json",
            "checkpoint inspect run/checkpoints/step_00000009",
        ],
        r"give another checkpoint",
        [f"checkpoint inspect {CHECKPOINT}"],
    ),
    # Plan
    "an unknown device": Case([f"{PLAN} --device h1000"], r"known are ([\w-]+),", [rf"{PLAN} --device \1"]),
    "a batch that does not divide": Case(
        [f"{P} --world-size 3"], r"would fit: (\d+)", [rf"{P} batch.tokens_per_step=\1 --world-size 3"]
    ),
    "a memory with its unit": Case(
        [f"{PLAN} --memory 24GB"], r"must be a number above 0, without a unit", [f"{PLAN} --memory 24"]
    ),
    "half a token": Case(
        [f"{PLAN} --tokens 10.5"], r"such as (\d+), (\w+)", [rf"{PLAN} --tokens \1", rf"{PLAN} --tokens \2"]
    ),
    "a picture without a folder": Case(
        [f"{PLAN} --plot no/plan.png"], r"file in a writable folder", [f"{PLAN} --plot plan.png"]
    ),
    "a model that does not fit": Case(
        [f"{PLAN} --memory 1.25"],
        r"does not fit.* (model\.activation_checkpointing=true) or a shorter (data\.seq_len)",
        [rf"{P} \1 \2=128 --world-size 4 --memory 1.25"],
        is_warning=True,
    ),
    # Report
    "a run twice": Case(["report run ./run"], r"name each run once", ["report run --out pages"]),
    "no run": Case(["report data"], r"give the folder of run\.out_dir", ["report run --out pages"]),
    "damaged results": Case(
        [f"{E} own --data own=choices.jsonl", "damage run/evaluation/own.json", "report run --out pages"],
        r"^error: (\S+): .*; remove it",
        [r"rm \1", "report run --out pages"],
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with documents, tokens, examples and a run. Tests work in a copy of it."""
    folder = tmp_path_factory.mktemp("advice")
    rows = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    choices = [{"query": f"{text}Good?", "choices": [" yes", " no"], "gold": 0} for text in TEXTS]
    jsonl: dict[str, list[object]] = {
        "docs.jsonl": [{"text": text} for text in TEXTS],
        "body.jsonl": [{"body": text} for text in TEXTS],
        "chats.jsonl": [{"messages": rows}] * 2,
        "lists.jsonl": [rows] * 2,
        "one.jsonl": [{"messages": rows}],
        "thinking.jsonl": [{"messages": [rows[0], {**rows[1], "thinking": "Hm."}]}],
        "choices.jsonl": list(choices),
        "long.jsonl": [{"context": "a", "continuation": "word " * 300}],
    }
    for name, content in jsonl.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "docs.txt").write_text("".join(TEXTS))
    (folder / "long.txt").write_text("word " * 300)
    (folder / "packed.jsonl").write_bytes(gzip.compress((folder / "docs.jsonl").read_bytes()))
    (folder / "choices.jsonl.gz").write_bytes(gzip.compress((folder / "choices.jsonl").read_bytes()))
    (folder / "plain.jsonl.gz").write_bytes((folder / "docs.jsonl").read_bytes())
    (folder / "wide.txt").write_bytes(WIDE.encode("utf-16-le"))
    with tarfile.open(folder / "all.tar", "w") as archive:
        member = tarfile.TarInfo("member.txt")
        member.size = len(WIDE)
        archive.addfile(member, io.BytesIO(WIDE.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), folder / "table.parquet")
    one = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"one": one}).save_to_disk(str(folder / "saved"))
    for name in ("empty", "odd", "raw", "nano", "characters", "llmc"):
        (folder / name).mkdir()
    (folder / "odd" / "notes").touch()
    tokens = np.arange(300, dtype=np.uint16)
    for name in ("raw/a.bin", "raw/b.bin", "nano/train.bin", "characters/train.bin"):
        tokens.tofile(folder / name)
    (folder / "characters" / "meta.pkl").write_bytes(b"")
    write_llmc(folder / "llmc" / "a_train_0.bin", tokens)
    write_ours(folder / "data", {"train": [tokens], "val": [tokens]})
    (folder / "good.json").write_text("{}")
    save_in_pieces(random_text_model(text_config()), text_config(folder / "run"), folder / "run")
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return folder


Run = Callable[[str], tuple[int, str]]


@pytest.fixture
def run(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command in a copy of the files. It returns the status and what is printed."""
    work = tmp_path / "work"
    shutil.copytree(files, work, copy_function=os.link)  # no command writes into a file of another
    monkeypatch.chdir(work)
    monkeypatch.setattr(datasets, "load_dataset", _no_network(datasets.load_dataset))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for module in MODULES.values():
        if hasattr(module, "start_logging"):
            monkeypatch.setattr(module, "start_logging", lambda: None)  # would outlive the call

    def run_line(line: str) -> tuple[int, str]:
        name, *arguments = shlex.split(line)
        if name not in MODULES:
            FILE_COMMANDS[name](*map(Path, arguments))
            return 0, ""
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as ended:
            run_command(MODULES[name].main)
        assert isinstance(ended.value.code, int)
        shown = capsys.readouterr()
        return ended.value.code, shown.err + shown.out

    return run_line


def _no_network(load: Callable[..., object]) -> Callable[..., object]:
    def load_local(path: str, *arguments: object, **options: object) -> object:
        if not os.path.exists(path):
            raise ConnectionError("no route to host")
        return load(path, *arguments, **options)

    return load_local


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def _replace(path: Path, content: bytes) -> None:
    """Write a new file, because the old one is a link to the file of all tests."""
    with suppress(FileNotFoundError):
        path.unlink()
    path.write_bytes(content)


def _untar(path: Path) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(path.parent, filter="data")


FILE_COMMANDS: dict[str, Callable[..., object]] = {
    "mv": os.rename,
    "rm": _remove,
    "cp": _copy,
    "touch": lambda path: _replace(path, b""),
    "damage": lambda path: _replace(path, path.read_bytes()[:-1] + b"?"),
    "decompress": lambda path: _replace(path, gzip.decompress(path.read_bytes())),
    "gunzip": lambda path: _replace(path.with_suffix(""), gzip.decompress(path.read_bytes())),
    "recode": lambda path: _replace(path, path.read_bytes().decode("utf-16-le").encode()),
    "untar": _untar,
}


@pytest.mark.parametrize("name", CASES)
def test_advice_cures(name: str, run: Run) -> None:
    case = CASES[name]
    *before, wrong = case.wrong
    for line in before:
        assert run(line)[0] == 0, line
    status, shown = run(wrong)
    found = re.search(case.advice, shown)
    assert found, shown
    assert (status == 0) == case.is_warning, shown
    for line in case.mended:
        status, shown = run(found.expand(line))
        assert status == 0, f"{found.expand(line)}: {shown}"
        assert not re.search(case.advice, shown), shown


def test_the_doctors_advice_about_variables_of_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, value in {"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    with suppress(SystemExit):
        launch.doctor.main()
    found = re.search(r"unset ([A-Z_ ]+)", capsys.readouterr().out)
    assert found
    for variable in found[1].split():
        monkeypatch.delenv(variable)
    with suppress(SystemExit):
        launch.doctor.main()
    assert "unset" not in capsys.readouterr().out

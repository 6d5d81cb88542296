"""The advice in an error message cures: each mistake is made, the advice is read from its message and followed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.errors import UserError
from pipeline.config.deepspeed_keys import MONITORS, OWNED_BY_RUN
from pipeline.config.keys import valid_keys
from pipeline.config.loading import load_config
from pipeline.data.batch_plan import plan_batch
from pipeline.data.datasets import open_datasets
from pipeline.data.loader import TrainLoader
from tests.pipeline.conftest import VOCAB_SIZE, write_shards
from tests.support.runs import CONFIGS

TOKENS = 413
GOOD: dict[str, Any] = {
    "run": {"precision": "fp32", "device": "cpu"},
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 32, "vocab_size": VOCAB_SIZE},
    "batch": {"tokens_per_step": 128, "micro_batch_size": 2},
    "schedule": {"warmup_steps": 0, "max_steps": 1},
}
LONG = ["model.context_length=512", "batch.tokens_per_step=4096", "batch.micro_batch_size=8"]
MIXTURE = 'data.mixture=[{"path": "data", "weight": 1}]'
DEEPSPEED = "backend.name=deepspeed"
ZERO = "backend.deepspeed.zero_optimization"

#: Overrides with a mistake; what the advice looks like; the mended overrides, with the advice's groups in them.
CASES: dict[str, tuple[list[str], str, list[str]]] = {
    "mistyped key": (["optimizer.learning_rat=0.1"], r"did you mean ([\w.]+)\?", [r"\1=0.1"]),
    "key of another section": (["run.max_steps=1"], r"did you mean ([\w.]+)\?", [r"\1=1"]),
    "Python's true": (["run.compile=True"], r"JSON writes (\w+), not True", [r"run.compile=\1"]),
    "Python's false": (["data.verify=False"], r"JSON writes (\w+), not False", [r"data.verify=\1"]),
    "Python's none": (["evaluation.max_batches=None"], r"JSON writes (\w+),", [r"evaluation.max_batches=\1"]),
    "a word for a choice": (["run.compile=maybe"], r"'auto', (\w+) or false", [r"run.compile=\1"]),
    "another choice": (["run.precision=fp8"], r"Input should be '(\w+)'", [r"run.precision=\1"]),
    "null turns nothing off": (["optimizer.grad_clip=null"], r"(\d+) turns clipping off", [r"optimizer.grad_clip=\1"]),
    "a number of steps": (
        ["schedule.warmup_steps=5"],
        r"not exceed max_steps \((\d+)\)",
        [r"schedule.warmup_steps=\1"],
    ),
    "two numbers": (["optimizer.betas=0.9,0.95"], r"as in --set '(.*)'", [r"\1"]),
    "a list of one": (["evaluation.tasks=validation"], r"as in --set '(.*)'", [r"\1"]),
    "a list with brackets alone": (["logging.sinks=[jsonl, csv]"], r"as in --set '(.*)'", [r"\1"]),
    "a mixture of one folder": (
        ["data.path=null", "data.mixture=[data]"],
        r'a list of \{("path"): folder, ("weight"): number',
        ["data.path=null", r'data.mixture=[{\1: "data", \2: 1}]'],
    ),
    "a long sample": (["data.seq_len=64"], r"not exceed model.context_length \((\d+)\)", [r"data.seq_len=\1"]),
    "a part of a batch": (["batch.tokens_per_step=100"], r"would fit: (\d+)", [r"batch.tokens_per_step=\1"]),
    "the next batch": (["batch.tokens_per_step=100"], r"would fit: \d+, (\d+)", [r"batch.tokens_per_step=\1"]),
    "an odd micro-batch": (
        ["batch.micro_batch_size=3"],
        r"micro_batch_size: 1, (\d+)",
        [r"batch.micro_batch_size=\1"],
    ),
    "more than the data": (
        ["batch.tokens_per_step=12800"],
        r"lower batch.tokens_per_step to (\d+), or tokenize more",
        [r"batch.tokens_per_step=\1"],
    ),
    "a micro-batch beyond the data": (
        ["batch.tokens_per_step=12800", "batch.micro_batch_size=100"],
        r"lower batch.tokens_per_step to (\d+) and batch.micro_batch_size to (\d+)",
        [r"batch.tokens_per_step=\1", r"batch.micro_batch_size=\2"],
    ),
    "a sample beyond the data": (
        [*LONG, "data.seq_len=512"],
        r"set data.seq_len to (\d+), batch.micro_batch_size to (\d+) and batch.tokens_per_step to (\d+)",
        [LONG[0], r"data.seq_len=\1", r"batch.micro_batch_size=\2", r"batch.tokens_per_step=\3"],
    ),
    "path and mixture, no path": (
        [MIXTURE, "data.path=data"],
        r"set one of ([\w.]+), [\w.]+ to null",
        [MIXTURE, r"\1=null"],
    ),
    "path and mixture, no mixture": (
        [MIXTURE, "data.path=data"],
        r"set one of [\w.]+, ([\w.]+) to null",
        ["data.path=data", r"\1=null"],
    ),
    "no path": (["data.path=null"], r"set one of ([\w.]+), data.mixture", [r"\1=data"]),
    "text without a vocabulary": (["evaluation.sample=true"], r"set ([\w.]+) to false", [r"\1=false"]),
    "no period": (
        ["model.activation_checkpointing=0"],
        r"must be true, false or a whole number from (\d+)",
        [r"model.activation_checkpointing=\1"],
    ),
    "no such task": (['evaluation.tasks=["hella"]'], r"there are (\w+)", [r'evaluation.tasks=["\1"]']),
    "mistyped key of DeepSpeed": (
        [DEEPSPEED, 'backend.deepspeed={"zero_optimisation": {"stage": 1}}'],
        r"did you mean (\w+)\?",
        [DEEPSPEED, r'backend.deepspeed={"\1": {"stage": 1}}'],
    ),
    "mistyped key of ZeRO": (
        [DEEPSPEED, f"{ZERO}.stage=1", f"{ZERO}.overlap_com=true"],
        r"did you mean (\w+)\?",
        [DEEPSPEED, f"{ZERO}.stage=1", rf"{ZERO}.\1=true"],
    ),
    "quantized weights, allowed": (
        [DEEPSPEED, f"{ZERO}.stage=3", f"{ZERO}.zero_quantized_weights=true"],
        r"or set ([\w.]+) to true",
        [DEEPSPEED, f"{ZERO}.stage=3", f"{ZERO}.zero_quantized_weights=true", r"\1=true"],
    ),
    "offload of another stage": (
        [DEEPSPEED, f"{ZERO}.stage=2", f'{ZERO}.offload_param={{"device": "cpu"}}'],
        r"needs ([\w.]+) (\d)",
        [DEEPSPEED, r"backend.deepspeed.\1=\2", f'{ZERO}.offload_param={{"device": "cpu"}}'],
    ),
    "an old key of ZeRO": (
        [DEEPSPEED, f"{ZERO}.stage=2", f"{ZERO}.cpu_offload=true"],
        r"set (\w+): (\{.*?\}) instead",
        [DEEPSPEED, f"{ZERO}.stage=2", rf"{ZERO}.\1=\2"],
    ),
    "DeepSpeed's JSON under ddp": (
        [f"{ZERO}.stage=1"],
        r'set ([\w.]+) to "(\w+)"',
        [r"\1=\2", f"{ZERO}.stage=1"],
    ),
}


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "data", {"train": [np.arange(TOKENS) % 80]})
    Path("good.json").write_text(json.dumps({**GOOD, "data": {"path": "data"}}))
    return tmp_path


def start(overrides: list[str], files: tuple[str, ...] = ("good.json",), deepspeed: str | None = None) -> None:
    """Do what a run does before it builds the model."""
    config = load_config(files, overrides, deepspeed)
    TrainLoader(open_datasets(config), plan_batch(config, 1), config.run.seed, rank=0)


def refusal(overrides: list[str], files: tuple[str, ...] = ("good.json",)) -> str:
    with pytest.raises(UserError) as refused:
        start(overrides, files)
    return str(refused.value)


def follow(message: str, advice: str, mended: list[str]) -> list[str]:
    found = re.search(advice, message)
    assert found, message
    return [found.expand(override) for override in mended]


def test_the_start_without_a_mistake_works() -> None:
    start([])


@pytest.mark.parametrize("name", CASES)
def test_advice_cures(name: str) -> None:
    overrides, advice, mended = CASES[name]
    start(follow(refusal(overrides), advice, mended))


@pytest.mark.parametrize("key", [*OWNED_BY_RUN, *MONITORS])
def test_a_key_of_deepspeed_is_replaced_by_a_key_that_exists(key: str) -> None:
    message = refusal([DEEPSPEED, f"backend.deepspeed.{key}=1"])
    assert "remove it and " in message
    named = re.search(r"set ([\w.*]+) instead|\(([\w.]+)\):? ?", message)
    assert named
    replacement = (named[1] or named[2]).removesuffix(".*")
    assert replacement in set(valid_keys()) or replacement.startswith("backend.deepspeed.zero_optimization.")
    start([DEEPSPEED])


def test_deepspeeds_own_json_goes_where_the_message_says() -> None:
    Path("mine.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "steps_per_print": 10}))
    [file] = follow(refusal([], ("good.json", "mine.json")), r"give it with --deepspeed (\S+),", [r"\1"])
    start([], deepspeed=file)


@pytest.mark.parametrize("name", ["zero1", str(CONFIGS / "zero1.json")])
def test_a_run_config_goes_where_the_message_says(name: str) -> None:
    with pytest.raises(UserError) as refused:
        start([], deepspeed=name)
    [file] = follow(str(refused.value), r"this is a run config.*; give it with --config (\S+),", [r"\1"])
    start([], (file, "good.json"))


def test_a_stage_of_zero_as_the_name_of_the_backend() -> None:
    [file] = follow(refusal(["backend.name=zero1"]), r"add it with --config (\w+)", [r"\1"])
    start([], (file, "good.json"))


def test_a_list_in_a_file() -> None:
    Path("mine.json").write_text(json.dumps({"evaluation": {"tasks": "validation"}}))
    [tasks] = follow(refusal([], ("good.json", "mine.json")), r"; write (\[.*\])$", [r"\1"])
    start([f"evaluation.tasks={tasks}"])


def test_the_default_warmup_of_a_shortened_run_is_named_as_a_default() -> None:
    with pytest.raises(UserError, match=r"warmup_steps \(715, the default\) must not exceed max_steps \(60\)"):
        load_config([], ["schedule.max_steps=60"])


def test_a_mistyped_config_file() -> None:
    [file] = follow(refusal([], ("god.json",)), r"did you mean (\S+)\?", [r"\1"])
    start([], (file,))

"""Each mistake of a user ends with one line that names the culprit and what is right, and with no traceback.

All commands of the table run once, two at a time, before the tests. Each names its own output folder.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import UserError
from tests.support.runs import REPOSITORY, run_ranks

#: A correct run of one step. Every broken config below is this one with one mistake on top.
GOOD: dict[str, dict[str, Any]] = {
    "run": {"precision": "fp32", "device": "cpu", "out_dir": "out"},
    "model": {"preset": "gpt2-tiny", "n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 32},
    "data": {"path": "data"},
    "batch": {"tokens_per_step": 128, "micro_batch_size": 2},
    "schedule": {"warmup_steps": 0, "max_steps": 1},
    "evaluation": {"max_batches": 1},
    "logging": {"sinks": ["jsonl", "console"]},
}
STEP = "checkpoints/step_00000001"


@dataclass(frozen=True)
class Case:
    """A command line, and two texts that its error line must contain: the culprit and what is right."""

    name: str
    arguments: tuple[str, ...]
    culprit: str
    right: str


def command(name: str, line: str, culprit: str, right: str) -> Case:
    """Return the case of a command line without spaces in its arguments."""
    return Case(name, tuple(line.split()), culprit, right)


def settings(name: str, overrides: str, culprit: str, right: str, script: str = "train.py") -> Case:
    """Return the good run with ``--set`` on top. ``run.py`` reads the same config and starts faster."""
    return command(name, f"{script} --config good.json --set {overrides}", culprit, right)


def config(
    name: str, content: dict[str, Any] | str | bytes, culprit: str, right: str, script: str = "train.py"
) -> Case:
    """Return the good run with ``<name>.json`` on top, a file with this text or JSON content."""
    CONFIG_FILES[f"{name}.json"] = content
    return Case(name, (script, "--config", "good.json", f"{name}.json"), culprit, right)


def deepspeed(name: str, native: Any, culprit: str, right: str, script: str = "run.py") -> Case:
    """Return the good run under DeepSpeed with this native JSON."""
    return config(name, {"backend": {"name": "deepspeed", "deepspeed": native}}, culprit, right, script)


CONFIG_FILES: dict[str, dict[str, Any] | str | bytes] = {"good.json": GOOD}

CONFIG_CASES = [
    # --- keys
    config("unknown_section", {"modle": {"n_layer": 2}}, "modle: no such key (set in unknown_section.json)", "model?"),
    config("unknown_key", {"schedule": {"max_step": 5}}, "schedule.max_step: no", "did you mean schedule.max_steps?"),
    config("wrong_section", {"run": {"max_steps": 5}}, "run.max_steps: no", "did you mean schedule.max_steps?"),
    config("far_from_any", {"zzzz": 1}, "zzzz: no such key", "valid keys here: run, model,", "run.py"),
    config("dotted_key", {"run.seed": 1}, "run.seed: no such key", "a section is an object", "run.py"),
    config("newline_in_a_key", {"run": {"se\ned": 1}}, "run.se ed: no such key", "run.seed?", "run.py"),
    config(
        "backend_key",
        {"backend": {"fsdp": {"reshard": True}}},
        "backend.fsdp.reshard",
        "reshard_after_forward?",
        "run.py",
    ),
    settings(
        "unknown_override",
        "optimizer.lr=1e-3",
        "optimizer.lr: no such key (set in --set)",
        "did you mean optimizer.learning_rate?",
    ),
    # --- types
    config(
        "text_for_integer",
        {"schedule": {"max_steps": "100"}},
        'found "100"',
        "schedule.max_steps: Input should be a",
        "run.py",
    ),
    config("fraction_for_integer", {"batch": {"micro_batch_size": 1.5}}, "micro_batch_size", "valid integer", "run.py"),
    config("true_for_integer", {"run": {"seed": True}}, "run.seed", "valid integer, found true", "run.py"),
    config("one_for_true", {"data": {"verify": 1}}, "data.verify", "valid boolean, found 1", "run.py"),
    config(
        "word_for_auto", {"run": {"compile": "atuo"}}, "run.compile: Input should be", "'auto', true or false", "run.py"
    ),
    config(
        "null_for_number", {"optimizer": {"learning_rate": None}}, "optimizer.learning_rate", "valid number", "run.py"
    ),
    config("text_for_section", {"model": "gpt2"}, 'found "gpt2"', "model: Input should be an object", "run.py"),
    config("null_for_section", {"run": None}, "found null", "run: Input should be an object", "run.py"),
    config(
        "list_for_name", {"model": {"preset": ["gpt2"]}}, "model.preset: Input should be 'gpt2", "'gpt2-xl'", "run.py"
    ),
    config("one_beta", {"optimizer": {"betas": [0.9]}}, "optimizer.betas.1", "item is missing, found [0.9]", "run.py"),
    config("text_for_betas", {"optimizer": {"betas": "0.9,0.95"}}, "optimizer.betas", "should be a list", "run.py"),
    config("text_for_list", {"evaluation": {"tasks": "validation"}}, "evaluation.tasks", "should be a list", "run.py"),
    # --- values
    config(
        "negative_rate",
        {"optimizer": {"learning_rate": -1}},
        "optimizer.learning_rate",
        "greater than 0, found -1",
        "run.py",
    ),
    config("nan_rate", '{"optimizer": {"learning_rate": NaN}}', "optimizer.learning_rate", "finite number, found NaN"),
    config("nan_dropout", '{"model": {"dropout": NaN}}', "model.dropout", "finite number, found NaN", "run.py"),
    config("dropout_of_one", {"model": {"dropout": 1.0}}, "model.dropout", "less than 1, found 1.0", "run.py"),
    config("no_steps", {"schedule": {"max_steps": 0}}, "schedule.max_steps", "greater than 0, found 0", "run.py"),
    config("nul_in_a_path", {"data": {"path": "a\0b"}}, "data.path: no file can have this name", "nul_in", "run.py"),
    config("control_characters", {"run": {"\x1b[31m": 1}}, "run.\\x1b[31m: no such key", "valid keys", "run.py"),
    config("empty_folder", {"run": {"out_dir": ""}}, "run.out_dir", "at least 1 character", "run.py"),
    settings(
        "unknown_precision", "run.precision=fp8", "run.precision", "'fp32', 'amp_bf16', 'amp_fp16' or 'bf16'", "run.py"
    ),
    settings(
        "unknown_backend", "backend.name=horovod", "backend.name", "'ddp', 'fsdp' or 'deepspeed', found", "run.py"
    ),
    settings("unknown_device", "run.device=gpu", "run.device", "'auto', 'cpu', 'cuda' or 'mps'"),
    settings(
        "unknown_preset", "model.preset=gpt3", "model.preset", "'gpt2-large' or 'gpt2-xl', found \"gpt3\"", "run.py"
    ),
    settings(
        "unknown_training_task", 'evaluation.tasks=["hella"]', "no such task 'hella'", "there are validation", "run.py"
    ),
    settings("absent_device", "run.device=cuda", "this machine has no cuda", "available: cpu"),
    # --- values that do not fit together
    settings("long_warmup", "schedule.warmup_steps=50", "warmup_steps (50)", "must not exceed max_steps (1)", "run.py"),
    settings("odd_heads", "model.n_head=3", "n_embd (16)", "must be a multiple of n_head (3)", "run.py"),
    settings("long_samples", "data.seq_len=64", "data.seq_len (64)", "must not exceed model.context_length (32)"),
    settings("odd_batch", "batch.tokens_per_step=100", "batch.tokens_per_step (100)", "would fit: 64, 128"),
    settings("small_batch", "batch.tokens_per_step=32", "batch.tokens_per_step (32)", "batch.micro_batch_size: 1"),
    settings("other_vocabulary", "model.vocab_size=1000", "model.vocab_size (1000)", "gpt2: 50257"),
    # --- files and overrides
    config("syntax", '{\n  "run": {"seed": 1,}\n}', "syntax.json:2:", "not valid JSON: "),
    config("no_object", "[]", "no_object.json: ", "expected a JSON object of sections, found []", "run.py"),
    config(
        "twice", '{"run": {"seed": 1, "seed": 2}}', "twice.json: the key 'seed' is given twice", "keep one", "run.py"
    ),
    config("latin", b'{"run": {"name": "\xff"}}', "latin.json: byte 18", "JSON in UTF-8", "run.py"),
    config("bottomless", '{"run":' * 100_000, "bottomless.json", "the JSON is nested too deep", "run.py"),
    command("mistyped_file", "train.py --config god.json", "god.json: no such config file", "did you mean good.json?"),
    command("folder_as_file", "run.py --config data", "data: cannot be read", "as a config file: Is a directory"),
    settings(
        "no_equals_sign", "schedule.max_steps", "--set schedule.max_steps: ", "expected section.key=value", "run.py"
    ),
    settings("no_key", "=5", "--set =5: ", "expected section.key=value, as in --set schedule.max_steps=100", "run.py"),
    settings("value_for_section", "run=3", "found 3 (set in --set)", "run: Input should be an object", "run.py"),
    settings("key_below_value", "run.seed.x=3", "run.seed: ", "valid integer", "run.py"),
]

DEEPSPEED_CASES = [
    deepspeed(
        "owned_batch", {"train_batch_size": 4}, "backend.deepspeed.train_batch_size", "set batch.tokens_per_step"
    ),
    deepspeed("owned_optimizer", {"optimizer": {"type": "Adam"}}, "deepspeed.optimizer", "set optimizer.* instead"),
    deepspeed("owned_precision", {"fp16": {"enabled": True}}, "backend.deepspeed.fp16", "set run.precision instead"),
    deepspeed("mistyped_native_key", {"zero_optimisation": {}}, "zero_optimisation", "did you mean zero_optimization?"),
    deepspeed("own_loggers", {"wandb": {"enabled": True}}, "backend.deepspeed.wandb", "set logging.sinks instead"),
    deepspeed(
        "quantized_weights",
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        "backend.deepspeed.zero_optimization.zero_quantized_weights: changes the numbers",
        "or set backend.allow_different_numbers to true",
    ),
    deepspeed(
        "mistyped_zero_key",
        {"zero_optimization": {"stage": 1, "overlap_com": True}},
        "zero_optimization.overlap_com: not among",
        "did you mean overlap_comm?",
    ),
    config(
        "deepspeed_json_as_config",
        {"train_batch_size": 8, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 1}},
        "deepspeed_json_as_config.json: this is DeepSpeed's own JSON (train_batch_size, zero_optimization)",
        "give it with --deepspeed deepspeed_json_as_config.json",
        "run.py",
    ),
    command(
        "deepspeed_json_with_owned_keys",
        "run.py --config good.json --deepspeed deepspeed_json_as_config.json",
        "backend.deepspeed.train_batch_size: the run config owns this",
        "set batch.tokens_per_step instead (set in deepspeed_json_as_config.json)",
    ),
    deepspeed("native_list", [], "backend.deepspeed: ", "should be an object, found []"),
    deepspeed("wrong_native_type", {"wall_clock_breakdown": "yes"}, "wall_clock_breakdown", "must be true or false"),
    deepspeed(
        "stage_7", {"zero_optimization": {"stage": 7}}, "zero_optimization.stage", "must be 0, 1, 2 or 3, found 7"
    ),
    deepspeed(
        "zero_no_object", {"zero_optimization": 2}, "zero_optimization: ", "must be an object, found 2", "train.py"
    ),
    deepspeed(
        "offload_of_the_wrong_stage",
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "backend.deepspeed.zero_optimization.offload_param",
        "needs zero_optimization.stage 3",
    ),
    deepspeed(
        "infinite_native_number",
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": float("inf")}},
        "backend.deepspeed: ",
        "every number must be finite",
    ),
    config(
        "native_json_under_ddp",
        {"backend": {"deepspeed": {"zero_optimization": {"stage": 1}}}},
        "backend.deepspeed: set, but backend.name is ddp",
        'set backend.name to "deepspeed"',
        "run.py",
    ),
    deepspeed(
        "refused_by_deepspeed",
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}},
        "backend.deepspeed: DeepSpeed refuses this config",
        "reduce_bucket_size: Input should be a valid integer",
        "train.py",
    ),
    deepspeed(
        "removed_native_key",
        {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
        "backend.deepspeed.zero_optimization.mics_shard_size: DeepSpeed 0.19 has no MiCS",
        "backend.fsdp.shard_group_size",
    ),
    deepspeed(
        "hpz_without_stage_3",
        {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}},
        "backend.deepspeed.zero_optimization.zero_hpz_partition_size: needs",
        "zero_optimization.stage 3, which is 2",
    ),
    deepspeed(
        "hpz_group_that_does_not_divide_the_ranks",
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        "backend.deepspeed.zero_optimization.zero_hpz_partition_size (2) does not divide the number of ranks (1)",
        "sizes that would fit: 1, or leave it out",
        "train.py",
    ),
    config(
        "shard_group_that_does_not_divide_the_ranks",
        {"backend": {"name": "fsdp", "fsdp": {"shard_group_size": 2}}},
        "backend.fsdp.shard_group_size (2) does not divide the number of ranks (1)",
        "sizes that would fit: 1, or null for all ranks",
        "train.py",
    ),
    deepspeed(
        "native_key_of_no_use",
        {"pipeline": {}},
        "backend.deepspeed.pipeline: not among",
        "remove it; those are zero_optim",
    ),
    deepspeed(
        "deprecated_native_key",
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        "backend.deepspeed.zero_optimization.cpu_offload",
        "set offload_optimizer",
    ),
]

DATA_CASES = [
    settings("no_data", "data.path=nowhere", "nowhere does not exist", "make one with gpt2-pipeline tokenize"),
    settings("no_manifest", "data.path=empty", "empty has no manifest.json", "make one with gpt2-pipeline tokenize"),
    settings("other_version", "data.path=other_version", "other_version/manifest.json", "this program reads 1"),
    settings(
        "missing_shard", "data.path=missing_shard", "missing_shard/train_00000_000.npy is missing", "tokenize again"
    ),
    settings("short_shard", "data.path=short_shard", "short_shard/train_00000_000.npy", "tokenize again"),
    settings(
        "too_little_data", "batch.tokens_per_step=64000000", "the split 'train' has", "lower batch.tokens_per_step to"
    ),
    command(
        "nothing_to_score_on",
        "evaluate.py --checkpoint trained --data validation=train_only",
        "no split 'val'",
        "--data validation=DIR",
    ),
    command(
        "input_does_not_exist",
        "tokenize_corpus.py --source text --input no.txt --out new_missing",
        "no.txt",
        "does not exist",
    ),
    command(
        "latin_text", "tokenize_corpus.py --source text --input latin.txt --out new_latin", "latin.txt", "valid UTF-8"
    ),
    command(
        "empty_text",
        "tokenize_corpus.py --source text --input empty.txt --out new_empty",
        "--source text",
        "nothing to tok",
    ),
    command(
        "pointer_text",
        "tokenize_corpus.py --source text --input pointer.txt --out new_pointer",
        "pointer.txt is a git-lfs pointer",
        "git lfs pull",
    ),
    command(
        "gzip_without_its_ending",
        "tokenize_corpus.py --source jsonl --input gzip.jsonl --out new_gzip",
        "gzip.jsonl is compressed by gzip",
        "end in .gz",
    ),
    command(
        "empty_tokens",
        "shards.py convert empty_tokens --out new_tokens --to npy",
        "empty_tokens/train.bin has no tokens (0 bytes)",
        "make it again",
    ),
    command(
        "no_text_field", "tokenize_corpus.py --source jsonl --input a.jsonl --out new_field", "a.jsonl:1", "'text'"
    ),
    command(
        "all_for_validation",
        "tokenize_corpus.py --source text --input good.json --out new_fraction --val-fraction 1",
        "--val-fraction",
        "at least 0 and below 1",
    ),
    command("other_corpus_there", "run.py --config good.json --set tokenize.source=python-stdlib", "data", "another"),
]

CHECKPOINT_CASES = [
    settings("out_below_a_file", "run.out_dir=file/out", "run.out_dir: cannot make file/out", "name a folder"),
    settings(
        "out_is_the_root", "run.out_dir=/", "run.out_dir: / is the home folder", "name a folder for the run alone"
    ),
    settings("remote_of_readers", "checkpoint.remote=https://x/y", "https:// can only be read", "such as s3://"),
    settings("out_is_a_file", "run.out_dir=file", "run.out_dir: cannot make file", "name a folder"),
    command(
        "resume_nowhere", "train.py --config good.json --resume nowhere", "nowhere: no checkpoint", "a run folder with"
    ),
    command(
        "start_over_in_a_used_folder",
        "train.py --config good.json --resume none --set run.out_dir=trained",
        "trained already holds checkpoints",
        "another run.out_dir",
    ),
    settings(
        "resume_of_another_model",
        "run.out_dir=trained schedule.max_steps=2 model.n_layer=2",
        "its model has n_layer 1, and this run's model has n_layer 2",
        "add --set model.n_layer=1, or start a new run in another run.out_dir",
    ),
    command(
        "branch_with_nothing_to_train",
        "train.py --config good.json --init-from trained --branch",
        "at step 1 of schedule.max_steps 1, nothing to train",
        "raise schedule.max_steps to train longer, or name an earlier checkpoint with --at-step",
    ),
    command(
        "weights_from_nowhere",
        "train.py --config good.json --init-from nowhere",
        "nowhere: no such file or folder",
        "expected a run folder, a checkpoint, a Hugging Face folder",
    ),
    command(
        "weights_of_another_size",
        "train.py --config good.json --init-from trained --set model.n_head=4",
        "have n_head 2, and this run's model has n_head 4",
        "add --set model.n_head=2",
    ),
    command(
        "weights_that_are_damaged",
        f"train.py --config good.json --init-from damaged/{STEP}",
        "rank_00000_weights.safetensors: contents changed",
        "give another checkpoint",
    ),
    command(
        "weights_into_a_used_folder",
        "train.py --config good.json --init-from damaged --set run.out_dir=trained schedule.max_steps=2",
        "belongs to a run that started from random weights",
        "use another run.out_dir to start from these weights",
    ),
    settings(
        "resume_and_weights",
        "checkpoint.init_from=trained checkpoint.resume=trained",
        "resume (trained) and init_from (trained) are both given",
        "set one of them",
        "run.py",
    ),
    settings("resume_with_another_seed", "run.out_dir=trained run.seed=5", "run.seed 1337, now it is 5", "to 1337, or"),
    command(
        "resume_of_a_damaged_one",
        f"train.py --config good.json --resume damaged/{STEP}",
        f"damaged/{STEP}/rank_00000_weights.safetensors: contents changed",
        "give another checkpoint",
    ),
    command("score_a_short_one", f"evaluate.py --checkpoint short/{STEP}", "weights.safetensors: 9 bytes", "expected "),
    command(
        "score_an_incomplete_one", f"generate.py --checkpoint lost/{STEP}", "state.json: missing", "another checkpoint"
    ),
    command("score_no_checkpoint", "evaluate.py --checkpoint data", "data/manifest.json", "checkpoint"),
    command(
        "score_an_empty_folder", "evaluate.py --checkpoint empty", "empty: no checkpoint here", "expected a run folder"
    ),
    command("sample_from_nowhere", "generate.py --checkpoint nowhere", "nowhere: no checkpoint here", "expected a run"),
]

COMMAND_LINE_CASES = [
    command("no_config", "train.py", "--config", "required: --config (see train.py --help)"),
    command("unknown_option", "train.py --config good.json --epochs 3", "arguments: --epochs 3", "see train.py --help"),
    command("no_checkpoint_option", "evaluate.py", "--checkpoint", "required: --checkpoint (see evaluate.py --help)"),
    command("unknown_task", "evaluate.py --checkpoint trained --tasks squad", "--tasks squad", "there are: validation"),
    command(
        "data_of_another_task",
        "evaluate.py --checkpoint trained --data piqa=nowhere.jsonl",
        "--data piqa=nowhere.jsonl: piqa is not among --tasks validation",
        "add it there",
    ),
    command(
        "limit_of_another_task",
        "evaluate.py --checkpoint trained --limit piqa=5",
        "--limit piqa=5: piqa is not among --tasks validation",
        "add it there",
    ),
    command("two_limits", "evaluate.py --checkpoint trained --limit 5 7", "--limit: every task", "give it once"),
    command(
        "two_files_of_a_task",
        "evaluate.py --checkpoint trained --tasks mine --data mine=a --data mine=b",
        "--data: mine is given more than once",
        "give it once",
    ),
    command("a_task_twice", "evaluate.py --checkpoint trained --tasks piqa piqa", "--tasks: piqa", "give it once"),
    command("limit_of_text", "evaluate.py --checkpoint trained --limit piqa=x", "--limit", "a whole number from 1"),
    command(
        "examples_nowhere",
        "evaluate.py --checkpoint trained --tasks mine --data mine=shapeless.jsonl --save-examples no/where.jsonl",
        "--save-examples no/where.jsonl: cannot be written",
        "a file in a folder that exists",
    ),
    command("data_of_no_task", "evaluate.py --checkpoint trained --data train_only", "--data: train_only", "TASK=PATH"),
    command(
        "task_of_no_shape",
        "evaluate.py --checkpoint trained --tasks mine --data mine=shapeless.jsonl",
        "shapeless.jsonl: row 1 has question",
        "query, choices, gold",
    ),
    command(
        "batch_of_none", "evaluate.py --checkpoint trained --batch-size 0", "--batch-size", "a whole number from 1"
    ),
    command(
        "batch_of_text", "evaluate.py --checkpoint trained --batch-size x", "--batch-size", "a whole number from 1"
    ),
    command("score_on_absent_device", "evaluate.py --checkpoint trained --device cuda", "--device", "available: cpu"),
    command("cold", "generate.py --checkpoint trained --temperature=-1", "--temperature", "must be a number from 0"),
    command(
        "nan_temperature", "generate.py --checkpoint trained --temperature nan", "--temperature", "a number from 0"
    ),
    command("hot", "generate.py --checkpoint trained --top-p 1.5", "--top-p", "must be above 0 and at most 1"),
    command(
        "import_of_a_path", "export.py --from-hf ./no --out new_import", "--from-hf ./no: no such folder", "a hub name"
    ),
    command("no_processes", "run.py --config good.json --processes 0", "--processes", "from 1, it is '0'"),
    command("unknown_source", "tokenize_corpus.py --source nosuch --out new_source", "'nosuch'", "'jsonl'"),
]

CASES = [*CONFIG_CASES, *DEEPSPEED_CASES, *DATA_CASES, *CHECKPOINT_CASES, *COMMAND_LINE_CASES]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_a_mistake_is_one_line_that_says_what_and_what_is_right(
    case: Case, results: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    result = results[case.name]
    assert result.returncode == UserError.exit_status, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert case.culprit in result.stderr
    assert case.right in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_no_command_wrote_anything(work_folder: Path, results: dict[str, subprocess.CompletedProcess[str]]) -> None:
    assert not list(work_folder.glob("out/*"))
    assert not list(work_folder.glob("new_*"))


def test_the_run_without_a_mistake_works(work_folder: Path) -> None:
    assert (work_folder / "trained" / STEP / "manifest.json").is_file()


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, work_folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Run every selected command. Returns the results by the names of the cases."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    selected = [spec.params["case"] for spec in specs if spec and isinstance(spec.params.get("case"), Case)]
    with ThreadPoolExecutor(max_workers=2) as pool, pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        done = pool.map(lambda case: run_when_free(work_folder, *case.arguments), selected)
        return {case.name: result for case, result in zip(selected, done, strict=True)}


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Make the folder in which the commands run: good and broken configs, data, runs and texts."""
    folder = tmp_path_factory.mktemp("bad_input")
    for name, content in CONFIG_FILES.items():
        text = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "empty").mkdir()
    (folder / "file").write_text("a regular file")
    (folder / "empty.txt").touch()
    (folder / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "gzip.jsonl").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (folder / "empty_tokens").mkdir()
    (folder / "empty_tokens" / "train.bin").touch()
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "a.jsonl").write_text('{"body": "no field named text"}\n')
    _make_data(folder, corpus)
    _make_runs(folder)
    return folder


def _make_data(folder: Path, corpus: Path) -> None:
    (folder / "shapeless.jsonl").write_text('{"question": "why?"}\n')
    for name in ("data", "other_version", "missing_shard", "short_shard", "train_only"):
        shutil.copytree(corpus, folder / name)
    _edit_json(folder / "other_version" / "manifest.json", lambda manifest: manifest.update(format_version=99))
    _edit_json(
        folder / "train_only" / "manifest.json",
        lambda manifest: manifest.update(shards=[s for s in manifest["shards"] if s["split"] == "train"]),
    )
    (folder / "missing_shard" / "train_00000_000.npy").unlink()
    os.truncate(folder / "short_shard" / "train_00000_000.npy", 1000)


def _make_runs(folder: Path) -> None:
    result = run(folder, "train.py", "--config", "good.json", "--set", "run.out_dir=trained")
    assert result.returncode == 0, result.stderr
    for name in ("damaged", "short", "lost"):
        shutil.copytree(folder / "trained", folder / name)
    weights = folder / "damaged" / STEP / "rank_00000_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.truncate(folder / "short" / STEP / "rank_00000_weights.safetensors", 9)
    (folder / "lost" / STEP / "state.json").unlink()


def _edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    content.pop("sha256", None)  # like the manifest of another program
    change(content)
    path.write_text(json.dumps(content))


def run_when_free(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command. Repeat it while another one holds the lock of the same run folder."""
    result = run(folder, *arguments)
    while "is in use by another run" in result.stderr:
        result = run(folder, *arguments)
    return result


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_ranks(1, REPOSITORY / "launch" / script, arguments, timeout_s=120, folder=folder)

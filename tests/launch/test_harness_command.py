"""``launch/harness.py`` runs tasks of lm-evaluation-harness on a checkpoint. The tasks here read local files."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import launch.harness
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import prepare_task
from tests.pipeline.evaluation.conftest import ALONE, scorer_of, write_lines
from tests.pipeline.interop.hugging_face.conftest import random_text_model, save_in_pieces, text_config
from tests.support.commands import Done, command_runner

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install -e '.[harness]'",
)

ROWS = [
    {"query": f"Question: What comes after {word}?\nAnswer:", "choices": ["one", "two", "twenty and three"], "gold": n}
    for n, word in enumerate(("zero", "one", "twenty-two"))
]
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICES = """
task: local_choices
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
COMPLETIONS = """
task: local_completions
output_type: generate_until
doc_to_text: query
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def run_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs ``launch/harness.py`` in this process, which saves the start of a new one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return command_runner(launch.harness, monkeypatch, capsys)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "a run, with a comma"
    return save_in_pieces(random_text_model(text_config()), text_config(folder), folder)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return scorer_of(random_text_model(text_config()))


@needs_harness
def test_tasks_of_the_harness_run_on_a_checkpoint(
    run_folder: Path, scorer: Scorer, tmp_path: Path, run_harness: Callable[..., Done]
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    for name, task in (("choices", CHOICES), ("completions", COMPLETIONS)):
        (tmp_path / f"{name}.yaml").write_text(task + TASK.format(file=rows))
    options = ["--include_path", tmp_path, "--output_path", tmp_path / "out", "--device", "cpu", "--log_samples"]
    tasks = ["--tasks", "local_choices", "local_completions"]
    status, output, errors = run_harness("--checkpoint", run_folder, "--precision", "fp32", *tasks, *options)
    assert status == 0, errors
    assert "gpt2-pipeline" in output and "local_choices" in output

    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())
    ours, _ = prepare_task("mine", str(rows), Settings(), scorer.model, ALONE).measure(scorer)
    for key in ("acc", "acc_norm"):
        assert results["results"]["local_choices"][f"{key},none"] == ours[key]
    assert results["results"]["local_completions"]["exact_match,none"] == 0
    assert results["config"]["step"] == 7 and results["config"]["precision"] == "fp32"
    assert len(list((tmp_path / "out").rglob("samples_local_completions_*.jsonl"))) == 1


@needs_harness
def test_a_mistake_is_one_line(run_folder: Path, tmp_path: Path, run_harness: Callable[..., Done]) -> None:
    mistakes: list[tuple[tuple[object, ...], str]] = [
        (("--checkpoint", run_folder, "--tasks", "no_such_task"), "lm_eval: Tasks not found: no_such_task"),
        (("--checkpoint", tmp_path, "--tasks", "piqa", "--device", "cpu"), "no checkpoint here"),
    ]
    for arguments, expected in mistakes:
        status, _, errors = run_harness(*arguments)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert status == 2, errors
        assert len(lines) == 1 and expected in lines[0], errors


def test_without_the_harness_the_error_says_how_to_install_it(
    tmp_path: Path, run_harness: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    status, _, errors = run_harness("--checkpoint", tmp_path, "--tasks", "piqa")
    assert status == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: lm-evaluation-harness cannot be imported") and "[harness]" in errors

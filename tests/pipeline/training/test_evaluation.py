"""Tasks are run on a model while it trains, also on backends with collective forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.shards.manifest import other_tokenizer
from pipeline.config.schema import Config, SampleConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.run import run_tasks
from pipeline.generation.text_generator import load_text_generator
from pipeline.run_folder.metrics import read_metrics
from pipeline.training.evaluation import prepare_tasks
from tests.pipeline.evaluation.conftest import ALONE, LAMBADA, PIQA, write_lines
from tests.support.runs import TINY_RUN, merged, train_run

STEPS = 4


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_two_ranks_measure_what_the_checkpoint_measures(backend: str, corpus: Path, tmp_path: Path) -> None:
    """Five examples, one per batch: one of the two ranks has a batch less, and must run as many forward passes."""
    files = {
        "piqa": str(write_lines(tmp_path / "piqa.jsonl", PIQA)),
        "lambada": str(write_lines(tmp_path / "lambada.jsonl", LAMBADA)),
    }
    sections = merged(
        TINY_RUN,
        {
            "data": {"path": str(corpus)},
            "schedule": {"max_steps": STEPS, "warmup_steps": 1},
            "batch": {"tokens_per_step": 192, "micro_batch_size": 1},
            "evaluation": {
                "tasks": ["piqa", "lambada"],
                "data": files,
                "max_examples": 5,
                "every_steps": 2,
                "sample": True,
            },
            "sample": {"prompt": "The", "max_new_tokens": 6, "temperature": 0},
            "logging": {"sinks": ["jsonl", "tensorboard", "console"]},
        },
    )
    run_folder = tmp_path / "run"
    result = train_run(backend, run_folder, sections, 2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "piqa_first5 | acc 0." in result.stdout
    rows = [row for row in read_metrics(run_folder) if "task_piqa_acc" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert not [row for row in read_metrics(run_folder) if "val_loss" in row], "validation is not among the tasks"
    results, _ = run_tasks(run_folder, ["piqa", "lambada"], Settings(limit=5), ALONE)
    for name in ("piqa", "lambada"):
        for key, value in results[f"{name}_first5"].items():
            if isinstance(value, float):
                assert rows[-1][f"task_{name}_{key}"] == pytest.approx(value, rel=1e-4), key
    samples = [row["sample"] for row in read_metrics(run_folder) if "sample" in row]
    assert len(samples) == 3
    greedy = SampleConfig(prompt="The", max_new_tokens=6, temperature=0)
    assert samples[-1] == "The" + load_text_generator(run_folder, ALONE.device).complete(["The"], greedy, seed=0)[0]
    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    texts = events.Tensors("sample/text_summary")
    assert [event.step for event in texts] == [0, 2, 4]
    assert texts[-1].tensor_proto.string_val[0].decode() == f"    {samples[-1]}\n"
    assert rows[0]["task_lambada_perplexity"] != pytest.approx(rows[-1]["task_lambada_perplexity"], rel=1e-3)


def test_an_unusable_task_is_an_error_before_the_first_step() -> None:
    sections = {"model": {"vocab_size": 89}, "evaluation": {"tasks": ["piqa"], "data": {"piqa": "nowhere.jsonl"}}}
    with pytest.raises(ConfigError, match="piqa: model.vocab_size is 89"):
        prepare_tasks(Config.model_validate(sections), ALONE, other_tokenizer(89))

"""A config with mistakes is refused with one line, which names each key, the file that sets it, and what is right."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.loading import load_config
from tests.pipeline.config.conftest import mistake
from tests.support.runs import CONFIGS


@pytest.mark.parametrize(
    ("content", "path", "nearest"),
    [
        ({"schedule": {"max_step": 1}}, "schedule.max_step", "did you mean schedule.max_steps?"),
        ({"modle": {}}, "modle", "did you mean model?"),
        ({"RUN": {"seed": 1}}, "RUN", "did you mean run?"),
        ({"run": {"SEED": 1}}, "run.SEED", "did you mean run.seed?"),
        ({"LR": 1}, "LR", "did you mean optimizer.learning_rate?"),
        ({"run": {"warmup_steps": 1}}, "run.warmup_steps", "did you mean schedule.warmup_steps?"),
        ({"max_steps": 1}, "max_steps", "did you mean schedule.max_steps?"),
        (
            {"backend": {"ddp": {"bucket_mb": 1}}},
            "backend.ddp.bucket_mb",
            "did you mean backend.ddp.bucket_cap_mb?",
        ),
        ({"optimizer": {"fused": 1}}, "optimizer.fused", "valid keys here: name, learning_rate, betas, eps"),
        ({"optimizer": {"lr": 1}}, "optimizer.lr", "did you mean optimizer.learning_rate?"),
        ({"block_size": 1024}, "block_size", "did you mean model.context_length?"),
        (
            {"data": {"mixture": [{"path": "a", "weight": 1}, {"path": "b", "weight": 1, "wieght": 1}]}},
            "data.mixture.1.wieght",
            "did you mean data.mixture.1.weight?",
        ),
    ],
)
def test_an_unknown_key_names_its_file_and_the_nearest(
    write: Any, content: dict[str, Any], path: str, nearest: str
) -> None:
    line = mistake([CONFIGS / "ddp.json", write("mine.json", content)])
    assert line.startswith(f"{path}: no such key (set in ")
    assert "mine.json)" in line
    assert nearest in line


def test_the_file_named_is_the_one_that_set_it(write: Any) -> None:
    bad, good = write("bad.json", {"run": {"seed": "x"}}), write("good.json", {"run": {"name": "b"}})
    assert "(set in " + str(bad) in mistake([bad, good])
    assert "(set in --set)" in mistake([bad, good], "run.seed=y")
    load_config([bad, good], ["run.seed=2"])  # corrected by the override


def test_an_unknown_key_is_reported_first(write: Any) -> None:
    line = mistake([write("a.json", {"run": {"seed": "x"}, "zzz": {}})])
    assert line.startswith("2 mistakes: (1) zzz: no such key")
    assert "; (2) run.seed: " in line


def test_all_mistakes_are_listed(write: Any) -> None:
    content = {
        "run": {"seed": "x", "sead": 1},
        "model": {"n_head": 7, "n_layer": 2, "activation_checkpointing": 3, "n_heads": 7},
        "schedule": {"warmup_steps": 9, "max_steps": 4},
        "data": {"mixture": [{"path": "a", "weight": 0, "wieght": 1}]},
        "backend": {"name": "deepspeed", "deepspeed": {"wandb": {"enabled": True}, "optimizer": {}}},
    }
    line = mistake([write("a.json", content)], "batch.micro_batch_size=0")
    for key in (
        "run.sead: no such key",
        "model.n_heads: no such key",
        "data.mixture.0.wieght: no such key",
        "run.seed: ",
        "must be a multiple of n_head (7)",
        "activation_checkpointing (3) must not exceed n_layer (2)",
        "warmup_steps (9) must not exceed",
        "data.mixture.0.weight: ",
        "batch.micro_batch_size: ",
        "backend.deepspeed.wandb: ",
        "backend.deepspeed.optimizer: ",
    ):
        assert key in line
    assert line.startswith("10 mistakes: ") and "\n" not in line


def test_many_mistakes_are_a_short_line(write: Any) -> None:
    """A hint is said once, and a file that is no run config does not fill the terminal."""
    line = mistake([write("a.json", {f"zz{number}": 1 for number in range(1000)})])
    assert line.startswith("1000 mistakes: (1) zz0: no such key") and line.count("valid keys here") == 1
    assert "(20) zz19: no such key" in line and "zz20:" not in line
    assert line.endswith("and 980 more, so this may not be a run config")


def test_all_mistakes_across_sections_are_listed() -> None:
    line = mistake([], "data.seq_len=2000", "evaluation.sample=true", "model.vocab_size=300")
    assert "data.seq_len (2000) must not exceed" in line and "evaluation.sample needs" in line


def test_a_mixture_replaces_the_path_of_an_earlier_file_if_that_is_set_to_null(write: Any) -> None:
    earlier, later = write("a.json", {"data": {"path": "x"}}), write("b.json", {"data": {"path": None}})
    mixture = 'data.mixture=[{"path": "a", "weight": 1}]'
    assert mistake([earlier], mixture).startswith("data: path (x) and mixture are both given")
    assert [component.path for component in load_config([earlier, later], [mixture]).data.components] == ["a"]
    line = mistake([], 'data.mixture=[{"path": "a", "weight": 0}]')
    assert line == "data.mixture.0.weight: Input should be greater than 0, found 0 (set in --set)"
    line = mistake([], 'data.mixture=[{"path": "a", "weight": null}]')
    assert "found null (set in --set); The dataset's share of the samples" in line


def test_a_task_that_cannot_name_a_file(write: Any) -> None:
    line = mistake([write("a.json", {"evaluation": {"data": {"a/b": "x.jsonl"}}})])
    assert line.startswith("evaluation.data.a/b: String should match pattern")


def test_a_long_value_is_cut() -> None:
    assert len(mistake([], f"run.seed={'x' * 10_000}")) < 200

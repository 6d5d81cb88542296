"""A ladder uses a run that exists already only if the run has the settings of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.layout import STATE_FILE, checkpoint_folder
from pipeline.config.loading import dump_config
from pipeline.errors import ConfigError
from pipeline.training.ladder import check_long_run, check_milestones, choose_branch_folder, has_step
from tests.pipeline.conftest import tiny_config


def write_checkpoint(run_folder: Path, step: int, **sections: dict[str, Any]) -> Path:
    folder = checkpoint_folder(run_folder, step)
    folder.mkdir(parents=True)
    counts = dict.fromkeys(("samples", "tokens", "updates", "loss_scale_good_steps", "seed"), 0)
    state = {"step": step, **counts, "loss_scale": None, "world_size": 1, "versions": {}}
    (folder / STATE_FILE).write_text(json.dumps({**state, "config": dump_config(tiny_config(**sections))}))
    return folder


@pytest.mark.parametrize(
    "section",
    [
        {"run": {"seed": 2}},
        {"run": {"precision": "bf16"}},
        {"model": {"dropout": 0.5}},
        {"data": {"path": "other"}},
        {"batch": {"tokens_per_step": 96}},
        {"optimizer": {"weight_decay": 0.5}},
        {"averaging": {"ema": 0.9}},
        {"schedule": {"warmup_steps": 3}},
        {"guard": {"spike_zscore": 9.0}},
        {"evaluation": {"max_batches": 3}},
        {"checkpoint": {"init_from": "weights"}},
    ],
    ids=str,
)
def test_a_long_run_with_other_numbers_is_refused(section: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 8)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}: was trained with other settings \(\S+ .* -> .*; name "):
        check_long_run(tmp_path, tiny_config(**section))


@pytest.mark.parametrize(
    "section",
    [
        {"run": {"name": "other", "rank_timeout_s": 9, "compile": False}},
        {"model": {"activation_checkpointing": True}},
        {"batch": {"micro_batch_size": 1}},
        {"backend": {"name": "fsdp"}},
        {"checkpoint": {"every_steps": 3}},
        {"evaluation": {"every_steps": 3, "sample": False}},
        {"logging": {"every_steps": 3}},
        {"schedule": {"max_steps": 99, "min_lr_ratio": 0.0}},
    ],
    ids=str,
)
def test_other_settings_of_the_long_run_may_change(section: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 8)
    check_long_run(tmp_path, tiny_config(**section))
    check_milestones(tmp_path, [8, 12])


def test_a_milestone_that_the_long_run_has_not_kept_is_refused(tmp_path: Path) -> None:
    for step in (4, 8):
        write_checkpoint(tmp_path, step)
    with pytest.raises(ConfigError, match="--milestones 6: .* has only kept the steps 4, 8; name some of these"):
        check_milestones(tmp_path, [4, 6])


def test_a_branch_with_other_settings_has_a_folder_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(schedule={"name": "wsd", "max_steps": 10, "decay_steps": 2})
    folder = choose_branch_folder(tmp_path, 8, config)
    assert folder == tmp_path / "decay-from-8-to-10"
    older = write_checkpoint(folder, 9, schedule={"name": "wsd", "max_steps": 10, "decay_steps": 2})
    newest = write_checkpoint(folder, 10, schedule={"name": "wsd", "max_steps": 10, "decay_steps": 3})
    assert choose_branch_folder(tmp_path, 8, config) == tmp_path / "decay-from-8-to-10-2"
    state = json.loads((newest / STATE_FILE).read_text())
    (newest / STATE_FILE).write_text(json.dumps({**state, "evaluation_is_due": True}))
    assert has_step(folder, 9) and not has_step(folder, 10), "a signal stopped the evaluation of step 10"
    (newest / STATE_FILE).write_text("{")
    assert choose_branch_folder(tmp_path, 8, config) == folder, "the run continues from the older checkpoint"
    (older / STATE_FILE).write_text("{")
    assert choose_branch_folder(tmp_path, 8, config) == folder, "the run has no good checkpoint"
    assert has_step(folder, 10) and not has_step(folder, 11)

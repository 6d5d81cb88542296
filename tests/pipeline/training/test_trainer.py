"""The training loop: what happens at which step, and what a stop, a bad step, a spike and a failed save do to a run."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from data_tools.errors import DataError
from data_tools.shards.manifest import TokenizerRecord
from pipeline.backends import create_backend
from pipeline.checkpoint import background
from pipeline.checkpoint.layout import list_checkpoints, step_of
from pipeline.checkpoint.mirror import Mirror
from pipeline.checkpoint.state import TrainingState, ValidationHistory, read_state
from pipeline.checkpoint.verification import find_damage, newest_good_checkpoint
from pipeline.data.batch_plan import plan_batch
from pipeline.data.datasets import data_sha256, open_datasets, tokenizer_of
from pipeline.data.loader import TrainLoader
from pipeline.distributed import step_clock
from pipeline.distributed.step_clock import StepClock, StepTimes
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, Interrupted, TrainingError
from pipeline.hardware.device import LateValue
from pipeline.model.gpt2 import build_model
from pipeline.report.overview import summarize_run
from pipeline.run_folder.metrics import SAMPLE_KEY, read_metrics
from pipeline.run_folder.sinks import ServiceSink, Sink
from pipeline.training import evaluation, run_record, throughput
from pipeline.training import trainer as trainer_module
from pipeline.training.group_norms import GroupNorms
from pipeline.training.resuming import load_start, why_complete
from pipeline.training.schedule import lr_at
from pipeline.training.start import Start
from pipeline.training.step_profile import StepProfile
from pipeline.training.summary import log_masks, log_results
from pipeline.training.throughput import ThroughputMeter
from pipeline.training.trainer import Trainer
from tests.pipeline.conftest import END_OF_TEXT, VOCAB_SIZE, largest_file, random_tokens, tiny_config, write_shards
from tests.support.fake_device import FakeDevice
from tests.support.host_reads import HostReads

STEPS, SAMPLES_PER_STEP = 10, 4
TOKENS_PER_STEP = 12 * SAMPLES_PER_STEP

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path, world: World) -> MakeTrainer:
    """Build trainers of a run over 400 tokens, one process, DDP, dropout; a keyword is a section of its config."""
    tokens = random_tokens(400, vocab_size=END_OF_TEXT).numpy()
    masks = {"train": [np.arange(400) % 3 > 0], "val": [np.ones(80, dtype=bool)]}
    for name, of_splits in (("plain", None), ("masked", masks)):
        write_shards(tmp_path / name, {"train": [tokens], "val": [tokens[:80]]}, masks=of_splits)

    def make(name: str = "run", data: str = "plain", resume_from: Path | None = None, **sections: Any) -> Trainer:
        defaults: dict[str, dict[str, Any]] = {
            "model": {"dropout": 0.1},
            "data": {"path": str(tmp_path / data)},
            "schedule": {"max_steps": STEPS},
            "checkpoint": {"every_steps": 4, "keep_last": 9},
            "evaluation": {"every_steps": 5},
            "logging": {"every_steps": 3, "sinks": ["jsonl", "console"]},
        }
        changed = {section: {**defaults.get(section, {}), **keys} for section, keys in sections.items()}
        config = tiny_config(tmp_path / name, **{**defaults, **changed})
        plan = plan_batch(config, world.size)
        datasets = open_datasets(config)
        loader = TrainLoader(datasets, plan, config.run.seed, world.rank)
        backend = create_backend(build_model(config.model, config.run.seed), config, world, plan)
        (tmp_path / name).mkdir(exist_ok=True)
        meter = ThroughputMeter(plan.tokens_per_step, 1, 1.0, world.device)
        start = Start.read(resume_from) if resume_from else None
        state = load_start(start, config, data_sha256(datasets), tokenizer_of(datasets), backend, world)
        return Trainer(config, world, backend, loader, meter, state, tasks={})

    return make


def rows_with(trainer: Trainer, key: str) -> dict[int, Any]:
    """Return the values of a key in a run's metrics, by step."""
    return {row["step"]: row[key] for row in read_metrics(trainer.run_folder) if key in row}


def before_step(trainer: Trainer, step: int, action: Callable[[], object]) -> None:
    """Call an action right before an optimizer step, whenever the run reaches it."""
    plain = trainer.train_step

    def train_step() -> Any:
        if trainer.state.step == step - 1:
            action()
        return plain()

    trainer.train_step = train_step  # type: ignore[method-assign]


def send_sigterm(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    while not trainer.stop_request.received:  # another thread receives the signal
        time.sleep(0.01)


def signal_in_evaluation(trainer: Trainer, step: int, batch: int) -> None:
    """Send SIGTERM right before a batch of the evaluation of a step. The first batch is number 1."""
    plain = trainer.stop_request.stop_evaluation
    batches = 0

    def stop_evaluation() -> None:
        nonlocal batches
        batches += trainer.state.step == step
        if batches == batch:
            send_sigterm(trainer)
        plain()

    trainer.stop_request.stop_evaluation = stop_evaluation  # type: ignore[method-assign]


def multiply_loss(trainer: Trainer, factor: float, samples: range) -> None:
    """Multiply the gradients of the steps that begin in a range of samples."""
    plain = trainer.backend.accumulate

    def accumulate(tokens: torch.Tensor, targets: torch.Tensor, loss_weight: Any, *, is_last: bool) -> torch.Tensor:
        consumed = trainer.guard.next_sample(trainer.state.samples, SAMPLES_PER_STEP)
        return plain(tokens, targets, loss_weight * (factor if consumed in samples else 1), is_last=is_last)

    trainer.backend.accumulate = accumulate  # type: ignore[method-assign]


def samples_of_step(step: int) -> range:
    return range((step - 1) * SAMPLES_PER_STEP, step * SAMPLES_PER_STEP)


class TestLoop:
    def test_every_step_is_trained_and_what_is_due_happens_and_is_recorded(self, make_trainer: MakeTrainer) -> None:
        """Logged every 3 steps, at the first, the last and each checkpoint; all is due at the last step."""
        trainer = make_trainer()
        trainer.fit()
        state = trainer.state
        assert (state.step, state.updates) == (STEPS, STEPS)
        assert (state.samples, state.tokens) == (STEPS * SAMPLES_PER_STEP, STEPS * TOKENS_PER_STEP)
        assert list(rows_with(trainer, "loss")) == [1, 3, 4, 6, 8, 9, 10]
        assert list(rows_with(trainer, "val_loss")) == [0, 5, 10]
        assert [step_of(folder) for folder in list_checkpoints(trainer.run_folder)] == [4, 8, 10]
        states = [read_state(folder)[0] for folder in list_checkpoints(trainer.run_folder)]
        assert [state.step for state in states] == [4, 8, 10]
        assert states[-1].data_sha256 == data_sha256(trainer.loader.datasets)
        assert states[-1].tokenizer == TokenizerRecord("test", VOCAB_SIZE, END_OF_TEXT, "0" * 64)
        assert states[-1].seed == trainer.config.run.seed

        for step, learning_rate in rows_with(trainer, "lr").items():
            assert learning_rate == lr_at(step - 1, trainer.config.optimizer, trainer.config.schedule)
        assert rows_with(trainer, "tokens")[6] == 6 * TOKENS_PER_STEP
        assert all(norm > 0 for norm in rows_with(trainer, "grad_norm").values())
        assert trainer.results == {
            "loss": rows_with(trainer, "loss")[STEPS],
            "mean_loss": rows_with(trainer, "mean_loss")[STEPS],
            "validation_loss": rows_with(trainer, "val_loss")[STEPS],
        }
        started = rows_with(trainer, "started")[0]
        assert started["world_size"] == 1
        assert started["backend"] == trainer.backend.describe()
        assert {"command", "host", "launcher", "python", "packages", "git", "device"} <= started.keys()

    def test_the_summary_repeats_the_loss_of_the_last_line(
        self, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = make_trainer(logging={"every_steps": 5}, checkpoint={"every_steps": STEPS})
        with caplog.at_level(logging.INFO):
            trainer.fit()
            log_results(trainer)
        *_, last_line = (line for line in caplog.messages if re.match(rf"step {STEPS}/{STEPS} \| loss", line))
        (summary,) = (line for line in caplog.messages if line.startswith("loss      "))
        assert summary.split()[1] == re.search(r"loss +(\S+)", last_line)[1]  # type: ignore[index]
        assert summarize_run(trainer.run_folder).loss == rows_with(trainer, "mean_loss")[STEPS]
        assert rows_with(trainer, "mean_loss")[STEPS] != rows_with(trainer, "loss")[STEPS]

    @pytest.mark.parametrize("compiles", [True, False])
    def test_what_compiles_is_announced_once(
        self, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, compiles: bool
    ) -> None:
        """Without these lines, a run is silent for minutes."""
        trainer = make_trainer()
        trainer.config = trainer.config.with_run(compile=compiles)  # the backend is not compiled, to save time
        with caplog.at_level(logging.INFO):
            trainer.fit()
        lines = [line for line in caplog.messages if line.startswith(("compile", "step  0/", "step  1/"))]
        of_loss = [line.partition(" |")[0] for line in lines]
        if compiles:
            assert of_loss[0].startswith("compile   the model for validation")
            assert of_loss[2].startswith("compile   the model for training")
            assert len(of_loss) == 4 and of_loss[1].startswith("step") and of_loss[3].startswith("step")
        else:
            assert len(of_loss) == 2

    def test_a_row_has_the_mean_loss_since_the_row_before(self, make_trainer: MakeTrainer) -> None:
        every, some = make_trainer("every", logging={"every_steps": 1}), make_trainer("some")
        for trainer in (every, some):
            trainer.fit()
        losses, before = rows_with(every, "loss"), 0
        assert rows_with(every, "mean_loss") == losses
        for step, mean in rows_with(some, "mean_loss").items():
            assert mean == pytest.approx(np.mean([losses[s] for s in range(before + 1, step + 1)]), rel=1e-12)
            before = step
        assert before == STEPS

    @pytest.mark.parametrize("data", ["plain", "masked"])
    def test_the_batch_decides_and_not_how_it_is_divided(self, make_trainer: MakeTrainer, data: str) -> None:
        """The loss is the mean over the scored targets of the global batch, not a mean of means."""
        losses = {}
        for size in (1, 2, 4):
            trainer = make_trainer(
                f"size_{size}", data, batch={"micro_batch_size": size}, model={"dropout": 0.0}, evaluation={"tasks": []}
            )
            trainer.fit()
            losses[size] = list(rows_with(trainer, "loss").values())
        assert losses[1] == pytest.approx(losses[4], abs=1e-5)
        assert losses[2] == pytest.approx(losses[4], abs=1e-5)

    def test_an_evaluation_does_not_change_the_training(self, make_trainer: MakeTrainer) -> None:
        often = make_trainer("often", evaluation={"every_steps": 1})
        never = make_trainer("never", evaluation={"tasks": []})
        for trainer in (often, never):
            trainer.fit()
        assert rows_with(often, "loss") == rows_with(never, "loss")
        assert rows_with(never, "val_loss") == {}


class UnreadValue(LateValue):
    """Records at which training step each value is read, and copies nothing."""

    newest_step = 0
    reads: ClassVar[list[tuple[int, int]]] = []  # (step of the value, newest step at the time)

    def __init__(self, value: torch.Tensor | float) -> None:
        self._value = value
        self._step = self.newest_step + 1

    def read(self) -> float:
        self.reads.append((self._step, self.newest_step))
        return float(self._value)


class TestWaiting:
    """On a GPU, a step is queued without waiting for the steps before it, and no judge reads the newest step."""

    @pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])
    def test_no_step_waits_for_the_device(
        self, make_trainer: MakeTrainer, world: World, monkeypatch: pytest.MonkeyPatch, precision: str
    ) -> None:
        trainer = make_trainer(data="masked", run={"precision": precision}, guard={"spike_zscore": 4.0})
        read_ahead = {first: trainer.loader.micro_batches(first) for first in range(0, 4 * SAMPLES_PER_STEP, 4)}
        monkeypatch.setattr(trainer.prefetcher, "micro_batches", read_ahead.__getitem__)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # takes the way of a GPU through the optimizer
        for module in ("trainer", "gradient_accumulation"):
            monkeypatch.setattr(f"pipeline.training.{module}.LateValue", UnreadValue)
        monkeypatch.setattr("pipeline.data.loader.MicroBatch.scored_targets", 16)  # counted in host memory
        monkeypatch.setattr(UnreadValue, "reads", [])
        for step in range(1, 5):
            monkeypatch.setattr(UnreadValue, "newest_step", step - 1)
            with HostReads() as reads:
                trainer.train_step()
            assert reads.found == []
            UnreadValue.newest_step = step
            trainer.world = replace(world, device=torch.device("cuda", 0))
            assert list(trainer._judge_finished_steps(judge_all=False)) == []
            trainer.world = world
        assert {newest - step for step, newest in UnreadValue.reads} == {1}
        assert len(UnreadValue.reads) == 3 * 3  # loss, norm and number of targets of three steps


class TestClocks:
    """A step takes the time in which the device computes it, and what only measures the run takes no time."""

    STEP_S, NORMS_S, PROFILE_S = 2.0, 64.0, 1024.0

    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
        device, counted = FakeDevice(), count(1)

        def read(value: LateValue) -> float:
            device.synchronize()
            return float(value._value)

        def measure(*_: Any) -> dict[str, float]:
            device.now_s += self.NORMS_S
            return {"layer_weight_norm/ln_f": 1.0}

        def count_step(profile: StepProfile) -> None:
            if profile.takes_long_after(next(counted)):
                device.now_s += self.PROFILE_S

        for module in (throughput, step_clock):
            monkeypatch.setattr(module, "time", device)
        for place in ("pipeline.training.throughput.synchronize", "pipeline.checkpoint.background.synchronize"):
            monkeypatch.setattr(place, device.synchronize)
        monkeypatch.setattr(LateValue, "read", read)
        monkeypatch.setattr(GroupNorms, "measure", measure)
        monkeypatch.setattr(StepProfile, "count_step", count_step)
        return device

    @pytest.mark.parametrize("logging", [{"norms_every_steps": 1}, {"profile_steps": 2}], ids=["norms", "profile"])
    def test_what_only_measures_the_run_takes_no_time(
        self, make_trainer: MakeTrainer, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, logging: dict[str, int]
    ) -> None:
        trainer = make_trainer(logging={"every_steps": 1, **logging})
        trainer.backend.step_clock = StepClock(trainer.world.device, is_active=True)
        plain = trainer.backend.step

        def step(*arguments: Any) -> Any:
            device.queued_s += self.STEP_S
            return plain(*arguments)

        monkeypatch.setattr(trainer.backend, "step", step)
        times: list[StepTimes | None] = []
        monkeypatch.setattr(trainer.rank_comparison, "start", lambda: times.append(trainer.backend.step_clock.read()))
        started_s = device.now_s
        trainer.fit()
        assert device.now_s - started_s > STEPS * self.STEP_S + min(self.NORMS_S, self.PROFILE_S)
        assert set(rows_with(trainer, "step_ms").values()) == {1e3 * self.STEP_S}
        assert all(each.compute_s <= self.STEP_S for each in times if each) and times[-1]


class TestMask:
    """Only the targets of the first 60 tokens are scored. With batches of 4 samples, some steps have none."""

    @pytest.fixture
    def trainer(self, make_trainer: MakeTrainer, tmp_path: Path) -> Trainer:
        tokens = random_tokens(400, vocab_size=END_OF_TEXT).numpy()
        masks = {"train": [np.arange(400) < 60], "val": [np.zeros(80, dtype=bool)]}
        write_shards(tmp_path / "prompts", {"train": [tokens], "val": [tokens[:80]]}, masks=masks)
        guard = {"spike_zscore": 1000.0, "spike_window": 10}  # reads the loss of each step
        return make_trainer(
            "run", "prompts", logging={"every_steps": 1, "sinks": ["jsonl", "tensorboard", "console"]}, guard=guard
        )

    def test_a_step_without_scored_targets_has_no_loss(
        self, trainer: Trainer, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            trainer.fit()
        losses, targets = rows_with(trainer, "loss"), rows_with(trainer, "scored_targets")
        empty = [step for step, count in targets.items() if not count]
        assert 0 < len(empty) < STEPS
        assert [step for step, loss in losses.items() if loss is None] == empty
        assert all(loss > 1 for loss in losses.values() if loss is not None)
        assert rows_with(trainer, "val_loss") == {0: None, 5: None, 10: None}
        assert caplog.text.count("none of its targets is scored") == 1
        assert f"step {empty[0]}: none of its targets is scored" in caplog.text
        assert f"steps without a scored target since this start: {len(empty)}" in caplog.text
        assert trainer.state.updates == STEPS, "the weights stay finite"
        assert trainer.results["loss"] == next(loss for loss in reversed(losses.values()) if loss is not None)
        assert trainer.results.keys() == {"loss", "mean_loss"}

    def test_the_scored_share_is_logged_at_the_start(self, trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
        """Of 33 windows of 12 tokens, the first 4 have 12 scored targets and the fifth 11. The validation has none."""
        with caplog.at_level(logging.INFO):
            log_masks(trainer)
        assert f"prompts, train: {100 * 59 / 396:.2f}% of the targets are scored" in caplog.text
        assert "prompts, train: 28 of 33 samples of 12 tokens have no scored target" in caplog.text
        assert "prompts, val: 7 of 7 samples of 12 tokens have no scored target" in caplog.text


class TestKeptCheckpoints:
    def test_milestones_are_saved_and_never_deleted(self, make_trainer: MakeTrainer) -> None:
        trainer = make_trainer(checkpoint={"every_steps": 4, "keep_last": 1, "keep_every_steps": 3})
        trainer.fit()
        assert [step_of(folder) for folder in list_checkpoints(trainer.run_folder)] == [3, 6, 9, 10]

    @pytest.mark.parametrize(
        ("losses", "best_step"),  # after steps 0, 2, 4, 6, 8, 10; the initial weights have no checkpoint
        [([5.0, 4.0, 3.0, 3.5, 3.4, 3.3], 4), ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2)],
    )
    def test_the_best_one_is_saved_and_kept(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, losses: list[float], best_step: int
    ) -> None:
        found = iter(losses)
        monkeypatch.setattr(evaluation, "validate", lambda *_: {"val_loss": next(found)})
        trainer = make_trainer(
            checkpoint={"every_steps": 5, "keep_last": 1, "keep_best": True}, evaluation={"every_steps": 2}
        )
        trainer.fit()
        assert [step_of(folder) for folder in list_checkpoints(trainer.run_folder)] == [best_step, 10]
        state, _ = read_state(list_checkpoints(trainer.run_folder)[-1])
        since_best = (10 - best_step) // 2
        assert state.validation == ValidationHistory(losses[best_step // 2], best_step, since_best)


class TestEarlyStop:
    def test_the_run_ends_with_a_checkpoint_at_the_target(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        losses = iter([5.0, 4.0, 3.0])
        monkeypatch.setattr(evaluation, "validate", lambda *_: {"val_loss": next(losses)})
        sections = {"schedule": {"stop_at_val_loss": 3.1}, "evaluation": {"every_steps": 2}}
        trainer = make_trainer(**sections)
        with caplog.at_level(logging.INFO):
            trainer.fit()
        assert trainer.state.step == 4
        assert "stopped after step 4 of 10: validation loss 3.0000 at step 4 has reached" in caplog.text
        newest = list_checkpoints(trainer.run_folder)[-1]
        assert step_of(newest) == 4
        again = make_trainer(resume_from=newest, **sections)
        again.fit()
        assert again.state.step == 4


class TestResume:
    def test_a_resumed_run_repeats_what_followed_the_checkpoint(self, make_trainer: MakeTrainer) -> None:
        whole = make_trainer("whole")
        whole.fit()
        fourth = list_checkpoints(whole.run_folder)[0]
        resumed = make_trainer("resumed", resume_from=fourth)
        assert resumed.state.step == 4
        resumed.fit()
        losses = rows_with(whole, "loss")
        assert rows_with(resumed, "loss") == {step: loss for step, loss in losses.items() if step > 4}
        assert list(rows_with(resumed, "val_loss")) == [5, 10], "only step 0 is evaluated before training"


class ReceivesASignal(World):
    """The main rank of two. The other rank has received SIGTERM."""

    def max(self, value: int) -> int:
        return max(value, signal.SIGTERM)


def test_unusable_weights_do_not_end_an_evaluation(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def complete(*_: Any) -> str:
        raise TrainingError("the model's logits are not finite")

    monkeypatch.setattr("pipeline.training.evaluation.complete_while_training", complete)
    trainer = make_trainer()
    samples = trainer.config.evaluation.model_copy(update={"sample": True})
    trainer.config = trainer.config.model_copy(update={"evaluation": samples})
    trainer.fit()
    assert list(rows_with(trainer, "val_loss")) == [0, 5, 10] and not rows_with(trainer, SAMPLE_KEY)
    assert "evaluation: the model's logits are not finite" in caplog.text


class TestStop:
    def test_a_signal_stops_after_the_step_with_a_checkpoint(self, make_trainer: MakeTrainer) -> None:
        trainer = make_trainer()
        before_step(trainer, 6, lambda: send_sigterm(trainer))
        with pytest.raises(Interrupted, match=f"SIGTERM received: stopped after step 6 of {STEPS}, ") as caught:
            trainer.fit()
        assert caught.value.exit_status == 128 + signal.SIGTERM
        newest = list_checkpoints(trainer.run_folder)[-1]
        assert step_of(newest) == 6 and find_damage(newest) is None
        assert 6 in rows_with(trainer, "loss")

    def test_a_signal_during_an_evaluation_stops_before_the_next_step(self, make_trainer: MakeTrainer) -> None:
        trainer = make_trainer(checkpoint={"every_steps": STEPS})
        plain = trainer.evaluate

        def evaluate() -> None:
            if trainer.state.step == 5:
                send_sigterm(trainer)
            plain()

        trainer.evaluate = evaluate  # type: ignore[method-assign]
        with pytest.raises(Interrupted, match=f"SIGTERM received: stopped after step 5 of {STEPS}, "):
            trainer.fit()
        assert read_state(list_checkpoints(trainer.run_folder)[-1])[0].step == 5

    @pytest.mark.parametrize("batch", [2, 6], ids=["of the weights", "of their average"])
    @pytest.mark.parametrize("step", [5, STEPS])
    def test_a_signal_stops_a_running_evaluation_and_the_next_start_repeats_it(
        self, step: int, batch: int, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
    ) -> None:
        averaging = {"averaging": {"ema": 0.5}}
        whole, stopped = make_trainer("whole", **averaging), make_trainer("stopped", **averaging)
        whole.fit()
        signal_in_evaluation(stopped, step, batch)
        with pytest.raises(
            Interrupted, match=f"SIGTERM received: stopped after step {step} of {STEPS}, the checkpoint"
        ):
            stopped.fit()
        assert f"the evaluation of step {step} was stopped; the next start repeats it" in caplog.text
        newest = list_checkpoints(stopped.run_folder)[-1]
        assert step_of(newest) == step and step not in rows_with(stopped, "val_loss")
        start = Start.read(newest)
        assert why_complete(start, stopped.config) is None

        resumed = make_trainer("stopped", resume_from=newest, **averaging)
        resumed.fit()
        for key in ("loss", "val_loss", "val_ema_loss"):
            assert rows_with(resumed, key) == {**rows_with(stopped, key), **rows_with(whole, key)}
        assert resumed.state == whole.state
        assert (why_complete(start, stopped.config) is None) == (step < STEPS), "the metrics have the results"

        again = make_trainer("stopped", resume_from=newest, **averaging)
        again.fit()
        assert again.state == whole.state
        steps = [row["step"] for row in read_metrics(again.run_folder) if "val_loss" in row]
        assert steps == [0, 5, 10], "no evaluation twice"

    def test_a_signal_in_the_last_step_does_not_interrupt_a_complete_run(
        self, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = make_trainer(evaluation={"tasks": []})
        before_step(trainer, STEPS, lambda: send_sigterm(trainer))
        with caplog.at_level(logging.INFO):
            trainer.fit()
        newest = list_checkpoints(trainer.run_folder)[-1]
        assert step_of(newest) == STEPS and why_complete(Start.read(newest), trainer.config)
        assert rows_with(trainer, "ended") == {STEPS: "finished"}
        assert "SIGTERM received in the last step: the run is complete" in caplog.text

    def test_a_signal_in_the_step_of_an_early_stop_does_not_interrupt_the_run(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = make_trainer(schedule={"stop_at_val_loss": 3.1})

        def validate(*_: Any) -> dict[str, float]:
            if trainer.state.step == 5:
                send_sigterm(trainer)
            return {"val_loss": 3.0}

        monkeypatch.setattr(evaluation, "validate", validate)
        with caplog.at_level(logging.INFO):
            trainer.fit()
        assert rows_with(trainer, "ended") == {5: "finished"}
        assert "stopped after step 5 of 10: validation loss 3.0000 at step 5 has reached" in caplog.text

    def test_a_signal_in_the_first_evaluation_has_nothing_to_save(self, make_trainer: MakeTrainer) -> None:
        trainer = make_trainer()
        signal_in_evaluation(trainer, 0, 2)
        with pytest.raises(Interrupted, match="SIGTERM received: stopped before the first step, nothing to save"):
            trainer.fit()
        assert trainer.state.step == 0 and not list_checkpoints(trainer.run_folder)

    def test_a_signal_on_another_rank_ends_a_completion(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All ranks must stop together, because each token needs collectives."""
        trainer = make_trainer()
        trainer.record.start(0)
        samples = trainer.config.evaluation.model_copy(update={"sample": True})  # a loaded config needs GPT-2's ids
        trainer.config = trainer.config.model_copy(update={"evaluation": samples})
        tokens = 0

        def complete(*arguments: Any) -> str:
            nonlocal tokens
            before_token = arguments[-1]
            for tokens in range(5):
                if tokens == 3:
                    monkeypatch.setattr(trainer.stop_request, "_world", ReceivesASignal(0, 2, 0, trainer.world.device))
                before_token()
            return "text"

        monkeypatch.setattr("pipeline.training.evaluation.complete_while_training", complete)
        trainer.evaluate()
        assert tokens == 3 and trainer.state.evaluation_is_due
        assert not trainer.stop_request.received and not read_metrics(trainer.run_folder)
        monkeypatch.undo()
        monkeypatch.setattr("pipeline.training.evaluation.complete_while_training", lambda *_: "text")
        trainer.evaluate()
        assert not trainer.state.evaluation_is_due and rows_with(trainer, SAMPLE_KEY) == {0: "text"}

    def test_after_a_signal_the_end_is_written_before_the_wait_for_the_upload(
        self, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The launcher may kill the ranks during this wait."""
        ends: list[Any] = []
        finish = Mirror.finish

        def finish_later(mirror: Mirror, *arguments: Any) -> Any:
            ends.append(read_metrics(mirror.run_folder)[-1].get("ended"))
            return finish(mirror, *arguments)

        monkeypatch.setattr(Mirror, "finish", finish_later)
        trainer = make_trainer(checkpoint={"remote": f"file://{tmp_path}/remote"})
        before_step(trainer, 6, lambda: send_sigterm(trainer))
        with pytest.raises(Interrupted):
            trainer.fit()
        assert ends == ["interrupted"]
        assert [step_of(folder) for folder in list_checkpoints(tmp_path / "remote")] == [4, 6]
        assert read_metrics(tmp_path / "remote")[-1]["ended"] == "interrupted"

    def test_an_error_leaves_no_thread_and_finishes_the_save_in_flight(self, make_trainer: MakeTrainer) -> None:
        def fail() -> None:
            raise ValueError("broken")

        trainer = make_trainer()
        before_step(trainer, 5, fail)
        with pytest.raises(ValueError, match="broken"):
            trainer.fit()
        (saved,) = list_checkpoints(trainer.run_folder)
        assert step_of(saved) == 4 and find_damage(saved) is None
        assert list(rows_with(trainer, "save_s")) == [4]


class TestFailedSaves:
    @staticmethod
    def break_saves(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
        plain = background.write_checkpoint

        def write(run_folder: Path, snapshot: Any, *rest: Any) -> Any:
            if snapshot.state.step in steps:
                raise CheckpointError(f"step {snapshot.state.step}: no space left")
            return plain(run_folder, snapshot, *rest)

        monkeypatch.setattr(background, "write_checkpoint", write)

    def test_an_earlier_one_is_counted_and_training_continues(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = make_trainer()
        self.break_saves(monkeypatch, {4, 8})
        trainer.fit()
        assert rows_with(trainer, "failed_saves") == {4: 1, 8: 2}
        assert [step_of(folder) for folder in list_checkpoints(trainer.run_folder)] == [STEPS]

    def test_an_infinite_number_in_a_checkpoint_is_counted_and_is_an_error_in_the_last_one(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """One number of AdamW's second moment overflows after step 4. Its weight then stays as it is."""
        infinite = "contains NaN or infinite numbers: no run can resume from it, and good older checkpoints are kept"
        trainer = make_trainer(checkpoint={"keep_last": 1})
        plain = trainer._advance

        def advance(first_sample: int) -> None:
            plain(first_sample)
            if trainer.state.step == 5:
                trainer.backend.fragments()[0].state["exp_avg_sq"][0] = math.inf

        monkeypatch.setattr(trainer, "_advance", advance)
        with caplog.at_level(logging.INFO):
            with pytest.raises(CheckpointError, match=rf"^saved \S+{STEPS} .*{infinite}$"):
                trainer.fit()
            log_results(trainer)
        assert rows_with(trainer, "failed_saves") == {8: 1, STEPS: 2}
        assert rows_with(trainer, "ended") == {STEPS: "failed"}
        good, newest = list_checkpoints(trainer.run_folder)
        assert (step_of(good), step_of(newest)) == (4, STEPS)
        assert newest_good_checkpoint(trainer.run_folder) == good
        assert [infinite in line for line in caplog.messages if line.startswith("saved /")] == [False, True, True]
        assert "failed    2 saves of a checkpoint" in caplog.messages and f"saved     {good}" in caplog.messages

    @pytest.mark.parametrize("asynchronous", [True, False])
    def test_the_last_one_is_an_error(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
    ) -> None:
        trainer = make_trainer(checkpoint={"asynchronous": asynchronous})
        self.break_saves(monkeypatch, {STEPS})
        with pytest.raises(CheckpointError, match=f"step {STEPS}: no space left"):
            trainer.fit()
        assert rows_with(trainer, "failed_saves") == {STEPS: 1}


class TestBadSteps:
    def test_a_skipped_step_is_recorded_and_is_no_update(self, make_trainer: MakeTrainer) -> None:
        trainer = make_trainer()
        multiply_loss(trainer, math.nan, samples_of_step(6))
        trainer.fit()
        assert rows_with(trainer, "skipped_samples") == {6: [20, 24]}
        assert rows_with(trainer, "grad_norm")[6] is None
        assert (trainer.state.step, trainer.state.updates) == (STEPS, STEPS - 1)
        assert rows_with(trainer, "skipped_steps") == {1: 0, 3: 0, 4: 0, 6: 1, 8: 1, 9: 1, 10: 1}
        assert [read_state(folder)[0].updates for folder in list_checkpoints(trainer.run_folder)] == [4, 7, 9]

    def test_too_many_in_a_row_stop_the_run(self, make_trainer: MakeTrainer) -> None:
        trainer = make_trainer(guard={"max_bad_steps": 2})
        multiply_loss(trainer, math.nan, range(5 * SAMPLES_PER_STEP, 1000))
        with pytest.raises(TrainingError, match=r"step 7: .* 2 steps in a row were not finite"):
            trainer.fit()
        assert [step_of(folder) for folder in list_checkpoints(trainer.run_folder)] == [4]

    def test_a_row_of_bad_steps_continues_after_a_resume(self, make_trainer: MakeTrainer) -> None:
        trainer = make_trainer()
        multiply_loss(trainer, math.nan, samples_of_step(4))
        trainer.fit()
        fourth = list_checkpoints(trainer.run_folder)[0]
        resumed = make_trainer("resumed", resume_from=fourth, guard={"max_bad_steps": 2})
        multiply_loss(resumed, math.nan, samples_of_step(5))
        with pytest.raises(TrainingError, match=r"step 5: .* 2 steps in a row"):
            resumed.fit()


class TestSpikes:
    GUARD = {"spike_zscore": 50.0, "spike_window": 10}
    LONGER = {"max_steps": 16}

    def test_the_run_is_rolled_back_and_the_batch_left_out(
        self, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = make_trainer(guard=self.GUARD, schedule=self.LONGER, logging={"every_steps": 1})
        multiply_loss(trainer, 1000.0, samples_of_step(14))
        with caplog.at_level(logging.WARNING):
            trainer.fit()
        assert "rolled back to" in caplog.text and "samples 52 to 55 are left out" in caplog.text
        assert rows_with(trainer, "left_out_samples") == {12: [52, 56]}
        logged = [row["step"] for row in read_metrics(trainer.run_folder) if "loss" in row]
        assert logged == list(range(1, 17)), "every step once"
        state, _ = read_state(list_checkpoints(trainer.run_folder)[-1])
        assert (state.step, state.updates, state.samples) == (16, 16, 17 * SAMPLES_PER_STEP)
        assert (state.guard.rollbacks, state.guard.skipped_samples) == (1, ((52, 56),))

    def test_a_signal_in_an_evaluation_after_a_rollback_stops_before_the_next_step(
        self, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The next step would drop the evaluation that the checkpoint lacks."""
        sections = {"guard": self.GUARD, "schedule": self.LONGER, "evaluation": {"every_steps": 12}}
        stopped = make_trainer(**sections)
        signal_in_evaluation(stopped, 12, batch=2)
        with pytest.raises(Interrupted):
            stopped.fit()
        newest = list_checkpoints(stopped.run_folder)[-1]
        resumed = make_trainer(resume_from=newest, **sections)
        multiply_loss(resumed, 1000.0, samples_of_step(14))
        plain = resumed.record.rewind

        def rewind(step: int) -> None:
            (resumed.run_folder / "metrics.jsonl").unlink()  # otherwise, they have the results
            send_sigterm(resumed)
            plain(step)

        resumed.record.rewind = rewind  # type: ignore[method-assign]
        with pytest.raises(Interrupted, match="stopped after step 12 of 16, the checkpoint is saved"):
            resumed.fit()
        assert caplog.text.count("the evaluation of step 12 was stopped; the next start repeats it") == 2
        again = make_trainer(resume_from=list_checkpoints(resumed.run_folder)[-1], **sections)
        again.fit()
        assert list(rows_with(again, "val_loss")) == [12, 16]

    def test_a_checkpoint_that_does_not_name_the_data_changes_nothing(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An earlier version wrote it, or it belongs to the data before ``data.path`` was changed."""
        trainer = make_trainer(guard=self.GUARD, schedule=self.LONGER, logging={"every_steps": 1})
        before = trainer.state
        plain = trainer_module.load_checkpoint

        def load(*arguments: Any) -> TrainingState:
            return replace(plain(*arguments), seed=before.seed + 1, data_sha256=None, tokenizer=None)

        monkeypatch.setattr(trainer_module, "load_checkpoint", load)
        multiply_loss(trainer, 1000.0, samples_of_step(14))
        trainer.fit()
        state, _ = read_state(list_checkpoints(trainer.run_folder)[-1])
        assert state.guard.rollbacks == 1 and before.tokenizer is not None
        assert [(each.seed, each.data_sha256, each.tokenizer) for each in (state, before)] == [
            (before.seed, before.data_sha256, before.tokenizer)
        ] * 2

    def test_the_average_is_rolled_back_too(self, make_trainer: MakeTrainer) -> None:
        """A run without the spike that leaves out the same batch has the same average."""
        sections = {"guard": self.GUARD, "schedule": self.LONGER, "averaging": {"ema": 0.9}}
        trainer, other = (make_trainer(name, **sections) for name in ("spiked", "other"))
        multiply_loss(trainer, 1000.0, samples_of_step(14))
        other.guard.state = replace(other.guard.state, skipped_samples=((52, 56),))
        for each in (trainer, other):
            each.fit()
        assert trainer.guard.state.rollbacks == 1 and other.guard.state.rollbacks == 0
        averages = [
            {fragment.name: fragment.state["ema"] for fragment in each.backend.fragments()} for each in (trainer, other)
        ]
        for name, average in averages[0].items():
            assert torch.equal(average, averages[1][name]), name
        assert rows_with(trainer, "val_ema_loss") == rows_with(other, "val_ema_loss")
        assert rows_with(trainer, "val_ema_loss").keys() == rows_with(trainer, "val_loss").keys()

    def test_without_a_checkpoint_the_run_continues(
        self, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = make_trainer(guard=self.GUARD, schedule=self.LONGER, checkpoint={"every_steps": 100})
        multiply_loss(trainer, 1000.0, samples_of_step(14))
        with caplog.at_level(logging.WARNING):
            trainer.fit()
        assert "no checkpoint yet to roll back to" in caplog.text
        assert (trainer.state.step, trainer.state.updates, trainer.state.samples) == (16, 16, 16 * SAMPLES_PER_STEP)
        assert rows_with(trainer, "left_out_samples") == {}


def test_a_start_without_room_for_the_rows_changes_no_file(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the start of the sinks, and has space again when the run ends."""
    sinks: dict[str, Any] = {"sinks": ["jsonl", "tensorboard", "csv", "console"]}
    first = make_trainer(logging=sinks)
    first.fit()
    again = make_trainer(resume_from=list_checkpoints(first.run_folder)[0], logging=sinks)
    create, start = run_record._create_sinks, again.record.start

    def create_with_service(config: Any, run_folder: Path) -> list[Sink]:
        service: Any = SimpleNamespace(name="service")
        return [*create(config, run_folder), ServiceSink(service, run_folder, waits=False)]

    def start_on_full_disk(resumed_step: int) -> None:
        with largest_file(300):
            start(resumed_step)

    def read_files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in first.run_folder.rglob("*") if path.is_file()}

    monkeypatch.setattr(run_record, "_create_sinks", create_with_service)
    monkeypatch.setattr(again.record, "start", start_on_full_disk)
    before = read_files()
    with pytest.raises(DataError, match=r"cannot write .*metrics\.jsonl: File too large"):
        again.fit()
    assert read_files() == before

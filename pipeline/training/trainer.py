"""Stage 2: the one training loop, the same for every backend."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.backends import Backend
from pipeline.checkpoint import (
    BackgroundSaver,
    TrainingState,
    bytes_of_tensors,
    load_training_state,
    newest_good_checkpoint,
)
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan
from pipeline.data.loader import MicroBatch, TrainLoader
from pipeline.data.prefetch import Prefetcher
from pipeline.distributed.device import GIB, LateValue, device_name, peak_memory_bytes, synchronize
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, Interrupted
from pipeline.evaluation.prepared import PreparedTask
from pipeline.evaluation.validation import validate
from pipeline.evaluation.while_training import measure_tasks
from pipeline.generation.samples import write_sample
from pipeline.model.gpt2 import parameter_count
from pipeline.run_folder.metrics import SAMPLE_KEY
from pipeline.seeds import derive_seed
from pipeline.training.interruption import StopRequest
from pipeline.training.run_record import RunRecord
from pipeline.training.schedule import lr_at
from pipeline.training.step_guard import FinishedStep, StepGuard, Verdict
from pipeline.training.step_profile import StepProfile
from pipeline.training.throughput import ThroughputMeter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedStep:
    """What one optimizer step leaves to be read later."""

    step: int
    first_sample: int
    stop_sample: int
    loss_share: Tensor  # this rank's part of the mean loss; the sum over ranks is that of the global batch
    grad_norm: LateValue  # global, unscaled, before clipping
    loss_scale: float
    learning_rate: float


class Trainer:
    """Runs optimizer steps from a state to ``schedule.max_steps``.

    Everything it needs is built before (see :mod:`pipeline.training.run`). It owns the loop: micro-steps,
    learning rate, logging, validation, checkpoints; the backend owns all that is distributed.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        plan: BatchPlan,
        backend: Backend,
        loader: TrainLoader,
        throughput: ThroughputMeter,
        data_sha256: str,
        resume_from: Path | None = None,
        tasks: Mapping[str, PreparedTask] | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.plan = plan
        self.backend = backend
        self.loader = loader
        self.prefetcher = Prefetcher(loader, world.device)
        self.throughput = throughput
        self.tasks = tasks or {}  # of evaluation.tasks, beside the validation
        self.run_folder = Path(config.run.out_dir)
        self.state = TrainingState(0, 0, 0, 0, *backend.loss_scaler.state, config.run.seed)
        if resume_from:
            self.state = self._load(resume_from)
        self.state = replace(self.state, seed=config.run.seed, data_sha256=data_sha256)
        self.guard = StepGuard(config.guard, self.state.guard)
        self.stop_request = StopRequest(world)
        options = config.checkpoint
        self.saver = BackgroundSaver(
            self.run_folder,
            dump_config(config),
            backend,
            world,
            keep_last=options.keep_last,
            asynchronous=options.asynchronous,
        )
        self.record = RunRecord(config, is_main=world.is_main, resumed_step=self.state.step)
        self.profile = StepProfile(self.run_folder, world.device, config.logging.profile_steps if world.is_main else 0)
        self.record.write_start(
            self.state.step,
            backend=backend.describe(),
            world_size=world.size,
            device=device_name(world.device),
            parameters=parameter_count(config.model),
        )
        self.results: dict[str, float] = {}  # the last loss and validation loss
        self._unjudged: list[TrainedStep] = []

    def fit(self) -> None:
        """Train to the last step; validate and save on the way and at the end.

        Raises:
            TrainingError: too many steps went wrong.
            CheckpointError: the last checkpoint could not be written; earlier ones that could not are only logged.
            Interrupted: a signal asked to stop; the state is saved.
        """
        try:
            with self.stop_request.listening(), self.profile.recording():
                received = self._train()
                self._finish_saving()
        finally:
            self.prefetcher.close()
            self.record.write_saves(self.saver.wait())  # on any way out, what is in flight is finished and verified
            self.record.close(self.results)
        if received:
            raise Interrupted(
                f"{received.name} received: stopped after step {self.state.step} of {self.config.schedule.max_steps}, "
                "the checkpoint is saved; run the same command again to continue",
                received,
            )

    def _train(self) -> signal.Signals | None:
        """The recipe of training; returns the signal that ended it early."""
        if self.state.step == 0:
            self.evaluate()
        self.throughput.restart()
        while self.state.step < self.config.schedule.max_steps:
            trained = self.train_step()
            self.profile.count_step()
            step, due = self.state.step, self._is_due
            received = self.stop_request.agreed()
            saves = due(step, self.config.checkpoint.every_steps) or received is not None
            evaluates = due(step, self.config.evaluation.every_steps)
            logs = saves or step == 1 or due(step, self.config.logging.every_steps)
            if self._rolled_back(judge_all=logs or evaluates):
                continue
            if logs:
                self.log_step(trained)
            if evaluates:
                self.evaluate()
            if saves:
                self.save()
            self.record.write_saves(self.saver.poll())
            if received:
                return received
        return None

    def train_step(self) -> TrainedStep:
        """One optimizer step; its loss and norm stay on the device, to be read late."""
        first_sample = self.guard.next_sample(self.state.samples, self.plan.samples_per_step)
        with self.throughput.waiting_for_data():
            micro_batches = self.prefetcher.micro_batches(first_sample)
        scored_targets = self._count_targets(micro_batches)
        loss_scale = self.backend.loss_scaler.scale
        loss_sum = torch.zeros((), device=self.world.device)
        for i, micro_batch in enumerate(micro_batches):
            self._seed_dropout(micro_batch)
            tokens, targets = micro_batch.to(self.world.device)
            # Backends average gradients over ranks; the world size turns that into the sum.
            loss_weight = self.world.size / scored_targets
            loss_sum += self.backend.accumulate(tokens, targets, loss_weight, is_last=i == len(micro_batches) - 1)
        learning_rate = lr_at(self.state.step, self.config.optimizer, self.config.schedule)
        grad_norm = LateValue(self.backend.step(learning_rate).grad_norm)
        self.throughput.count_step()
        self._advance(first_sample)
        trained = TrainedStep(
            self.state.step,
            first_sample,
            self.state.samples,
            loss_sum / scored_targets,
            grad_norm,
            loss_scale,
            learning_rate,
        )
        self._unjudged.append(trained)
        return trained

    def _count_targets(self, micro_batches: list[MicroBatch]) -> int | Tensor:
        """Scored targets of the global batch, known before the first backward pass."""
        if not self.loader.has_mask:
            return self.plan.tokens_per_step
        local = sum(micro_batch.scored_targets for micro_batch in micro_batches)
        total = self.world.sum(torch.tensor(local, device=self.world.device))
        return torch.clamp(total, min=1)  # a step without any target changes nothing

    def _seed_dropout(self, micro_batch: MicroBatch) -> None:
        """Dropout is a function of seed and samples: the same on resume, backend and world size."""
        if self.config.model.dropout:
            torch.manual_seed(derive_seed(self.config.run.seed, "dropout", micro_batch.first_sample))

    def _advance(self, first_sample: int) -> None:
        loss_scale, good_steps = self.backend.loss_scaler.state
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            samples=first_sample + self.plan.samples_per_step,
            tokens=self.state.tokens + self.plan.tokens_per_step,
            loss_scale=loss_scale,
            loss_scale_good_steps=good_steps,
        )

    def _rolled_back(self, *, judge_all: bool) -> bool:
        """Judge finished steps; True: one of them spiked, and the state is that of an earlier checkpoint.

        On a GPU the newest step is left for the next turn unless ``judge_all``: reading its norm would wait for it.
        """
        leave = 1 if self.world.device.type == "cuda" and not judge_all else 0
        while len(self._unjudged) > leave:
            trained = self._unjudged.pop(0)
            finished = self._read(trained)
            verdict = self.guard.judge(finished)
            if verdict is Verdict.SPIKE and self._roll_back(finished):
                return True
            if verdict is Verdict.SKIPPED:
                samples = [trained.first_sample, trained.stop_sample]
                self.record.write({"step": trained.step, "skipped_samples": samples}, console=False)
            updates = self.state.updates + (verdict is not Verdict.SKIPPED)
            self.state = replace(self.state, updates=updates, guard=self.guard.state)
        return False

    def _read(self, trained: TrainedStep) -> FinishedStep:
        loss = self.world.sum(trained.loss_share).item() if self.guard.watches_spikes else None
        return FinishedStep(
            trained.step, trained.first_sample, trained.stop_sample, trained.grad_norm.read(), trained.loss_scale, loss
        )

    def _roll_back(self, spike: FinishedStep) -> bool:
        """Go back to the newest good checkpoint; the batch of the spike will be left out. Collective."""
        self.record.write_saves(self.saver.wait())
        folder = self.world.call_on_main(lambda: newest_good_checkpoint(self.run_folder))
        if folder is None:
            log.warning("there is no checkpoint yet to go back to: the run goes on")
            return False
        stored = self._load(folder)
        self.guard.after_rollback(stored.guard, spike)
        self.state = replace(stored, guard=self.guard.state)
        self._unjudged.clear()
        log.warning("went back to %s; samples %d to %d are left out", folder, spike.first_sample, spike.stop_sample - 1)
        self.record.rewind(stored.step)
        samples = [spike.first_sample, spike.stop_sample]
        self.record.write({"step": stored.step, "left_out_samples": samples}, console=False)
        self.throughput.restart()
        return True

    def _load(self, folder: Path) -> TrainingState:
        started = time.perf_counter()
        state = load_training_state(folder, self.backend)
        self.world.barrier()
        seconds, size = time.perf_counter() - started, bytes_of_tensors(folder)
        log.info("loaded %s in %.2f s, %s MB/s", folder, seconds, f"{size / seconds / 1e6:,.0f}")
        return state

    def log_step(self, trained: TrainedStep) -> None:
        """Read the late values of a step and write them down. Collective."""
        self.results["loss"] = loss = self.world.sum(trained.loss_share).item()
        synchronize(self.world.device)
        row = {
            "step": trained.step,
            "loss": loss,
            "lr": trained.learning_rate,
            "grad_norm": trained.grad_norm.read(),
            "tokens": self.state.tokens,
            **self.throughput.read(),
            "peak_memory_gib": peak_memory_bytes(self.world.device) / GIB,
            "skipped_steps": self.state.step - self.state.updates,
        }
        if self.backend.loss_scaler.dynamic:
            row["loss_scale"] = self.backend.loss_scaler.scale
        self.record.write(row)

    def evaluate(self) -> None:
        """Measure the validation loss and the tasks, and generate a sample of text. Collective."""
        with self.throughput.paused(), self.backend.evaluation_mode():
            if figures := validate(self.backend, self.loader.parts, self.config, self.world):
                self.results["validation_loss"] = figures["val_loss"]
                self.record.write({"step": self.state.step, "tokens": self.state.tokens, **figures})
            # Examples and prompts have many shapes: a compiled model would be compiled again for each of them.
            with torch.compiler.set_stance("force_eager"):
                if self.tasks:
                    figures = measure_tasks(self.tasks, self.backend, self.config, self.world)
                    self.record.write({"step": self.state.step, **figures}, console=False)
                if self.config.evaluation.sample:
                    text = write_sample(self.backend, self.config, self.world)
                    self.record.write({"step": self.state.step, SAMPLE_KEY: text}, console=False)

    def save(self) -> None:
        """Begin a checkpoint of the current state; training may go on. Collective."""
        with self.throughput.paused():
            self.backend.model.assert_tied()
            self.record.write_saves(self.saver.start(self.state))

    def _finish_saving(self) -> None:
        """Wait until the last checkpoint stands.

        Raises:
            CheckpointError: it could not be written.
        """
        for outcome in self.saver.wait():
            self.record.write_saves([outcome])
            if outcome.problem:
                raise CheckpointError(outcome.problem)

    def _is_due(self, step: int, every_steps: int) -> bool:
        return step % every_steps == 0 or step == self.config.schedule.max_steps

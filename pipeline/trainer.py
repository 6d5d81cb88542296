"""Stage 2: the one training loop, the same for every backend."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.shards import TokenStream
from data_tools.storage import write_json_durably
from pipeline.backends import Backend
from pipeline.batch_plan import BatchPlan
from pipeline.checkpoint import TrainingState, load_training_state, save_checkpoint
from pipeline.config import Config
from pipeline.config_files import dump_config
from pipeline.distributed import World
from pipeline.errors import TrainingError
from pipeline.hardware import peak_memory_bytes, summing_dtype, synchronize
from pipeline.loader import MicroBatch, TrainLoader, validation_batches
from pipeline.metrics import MetricsLog, format_row, perplexity
from pipeline.schedule import lr_at
from pipeline.seeds import derive_seed
from pipeline.throughput import ThroughputMeter

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GIB = 1 << 30


@dataclass(frozen=True)
class TrainedStep:
    """What one optimizer step leaves to be read later."""

    loss_share: Tensor  # this rank's part of the mean loss; the sum over ranks is that of the global batch
    grad_norm: Tensor | float  # global, unscaled, before clipping
    learning_rate: float


class Trainer:
    """Runs optimizer steps from a state to ``schedule.max_steps``.

    Everything it needs is built before (see :mod:`pipeline.training_run`). It owns the loop: micro-steps,
    learning rate, logging, validation, checkpoints; the backend owns all that is distributed.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        plan: BatchPlan,
        backend: Backend,
        loader: TrainLoader,
        validation: TokenStream | None,
        throughput: ThroughputMeter,
        resume_from: Path | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.plan = plan
        self.backend = backend
        self.loader = loader
        self.validation = validation
        self.throughput = throughput
        self.run_folder = Path(config.run.out_dir)
        self.state = TrainingState(0, 0, 0, 0, backend.loss_scaler.scale, 0, config.run.seed)
        if resume_from:
            self.state = load_training_state(resume_from, backend)
        self.metrics = self._open_metrics() if world.is_main else None
        self.last_loss = math.nan
        self.validation_loss: float | None = None

    def fit(self) -> None:
        """Train to the last step; validate and save on the way and at the end.

        Raises:
            TrainingError: a loss or gradient that is not finite.
            CheckpointError: a checkpoint could not be written.
        """
        schedule, due = self.config.schedule, self._is_due
        if self.state.step == 0:
            self.validate()
        self.throughput.restart()
        while self.state.step < schedule.max_steps:
            trained = self.train_step()
            step = self.state.step
            saves = due(step, self.config.checkpoint.every_steps)
            if saves or step == 1 or due(step, self.config.logging.every_steps):
                self.log_step(trained)  # also before a save: what is not finite must not be saved
            if due(step, self.config.evaluation.every_steps):
                self.validate()
            if saves:
                self.save()
        self._close_metrics()

    def train_step(self) -> TrainedStep:
        """One optimizer step; its loss and norm stay on the device, to be read late."""
        micro_batches = self.loader.micro_batches(self.state.samples)
        scored_targets = self._count_targets(micro_batches)
        loss_sum = torch.zeros((), device=self.world.device)
        for i, micro_batch in enumerate(micro_batches):
            self._seed_dropout(micro_batch)
            tokens, targets = micro_batch.to(self.world.device)
            # Backends average gradients over ranks; the world size turns that into the sum.
            loss_weight = self.world.size / scored_targets
            loss_sum += self.backend.accumulate(tokens, targets, loss_weight, is_last=i == len(micro_batches) - 1)
        learning_rate = lr_at(self.state.step, self.config.optimizer, self.config.schedule)
        result = self.backend.step(learning_rate)
        self.throughput.count_step()
        self._advance()
        return TrainedStep(loss_sum / scored_targets, result.grad_norm, learning_rate)

    def _count_targets(self, micro_batches: list[MicroBatch]) -> int | Tensor:
        """Scored targets of the global batch, known before the first backward pass."""
        if self.loader.target_mask is None:
            return self.plan.tokens_per_step
        local = sum(micro_batch.scored_targets for micro_batch in micro_batches)
        total = self.world.sum(torch.tensor(local, device=self.world.device))
        return torch.clamp(total, min=1)  # a step without any target changes nothing

    def _seed_dropout(self, micro_batch: MicroBatch) -> None:
        """Dropout is a function of seed and samples: the same on resume, backend and world size."""
        if self.config.model.dropout:
            torch.manual_seed(derive_seed(self.config.run.seed, "dropout", micro_batch.first_sample))

    def _advance(self) -> None:
        scaler = self.backend.loss_scaler
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            samples=self.state.samples + self.plan.samples_per_step,
            tokens=self.state.tokens + self.plan.tokens_per_step,
            updates=self.backend.updates,
            loss_scale=scaler.scale,
            loss_scale_good_steps=scaler.good_steps,
        )

    def log_step(self, trained: TrainedStep) -> None:
        """Read the late values of a step and write them down. Collective.

        Raises:
            TrainingError: the loss or the gradient norm is not finite.
        """
        self.last_loss = self.world.sum(trained.loss_share).item()
        grad_norm = float(trained.grad_norm)
        synchronize(self.world.device)
        self._stop_if_not_finite(self.last_loss, grad_norm)
        row = {
            "step": self.state.step,
            "loss": self.last_loss,
            "lr": trained.learning_rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens": self.state.tokens,
            **self.throughput.read(),
            "peak_memory_gib": peak_memory_bytes(self.world.device) / GIB,
        }
        if self.backend.loss_scaler.dynamic:
            row |= {"loss_scale": self.backend.loss_scaler.scale, "skipped_steps": self.state.step - self.state.updates}
        self._write(row)

    def _stop_if_not_finite(self, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self.backend.loss_scaler.dynamic):
            return
        last = self.state.samples - 1
        first = self.state.samples - self.plan.samples_per_step
        raise TrainingError(
            f"step {self.state.step}: loss {loss}, gradient norm {grad_norm} (samples {first} to {last}); stopped, the "
            "checkpoints so far are intact; lower optimizer.learning_rate, lengthen schedule.warmup_steps, or use bf16"
        )

    def validate(self) -> None:
        """Mean loss over (a part of) the validation split. Collective."""
        if self.validation is None or "validation" not in self.config.evaluation.tasks:
            return
        with self.throughput.paused(), self.backend.evaluation_mode():
            self.validation_loss = self._validation_loss(self.validation)
            self._write(
                {
                    "step": self.state.step,
                    "val_loss": self.validation_loss,
                    "val_perplexity": perplexity(self.validation_loss),
                }
            )

    def _validation_loss(self, stream: TokenStream) -> float:
        batch, options = self.config.batch, self.config.evaluation
        sums = torch.zeros(2, dtype=summing_dtype(self.world.device), device=self.world.device)
        for micro_batch in validation_batches(
            stream, self.plan.seq_len, batch.micro_batch_size, self.world.rank, self.world.size, options.max_batches
        ):
            tokens, targets = micro_batch.to(self.world.device)
            sums[0] += self.backend.evaluate(tokens, targets)
            sums[1] += micro_batch.scored_targets
        loss_sum, targets_sum = self.world.sum(sums).tolist()
        return float(loss_sum / targets_sum)

    def save(self) -> None:
        """Write a checkpoint. Collective."""
        with self.throughput.paused():
            self.backend.model.assert_tied()
            folder = save_checkpoint(
                self.run_folder,
                self.state,
                dump_config(self.config),
                self.backend,
                self.world,
                self.config.checkpoint.keep_last,
            )
            log.info("saved %s", folder)

    def _is_due(self, step: int, every_steps: int) -> bool:
        return step % every_steps == 0 or step == self.config.schedule.max_steps

    def _open_metrics(self) -> MetricsLog:
        self.run_folder.mkdir(parents=True, exist_ok=True)
        write_json_durably(self.run_folder / CONFIG_FILE, dump_config(self.config))
        return MetricsLog(self.run_folder, resumed_step=self.state.step, tensorboard=self.config.logging.tensorboard)

    def _write(self, row: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(row)
            log.info(format_row(row, self.config.schedule.max_steps))

    def _close_metrics(self) -> None:
        if self.metrics:
            results = {"final/loss": self.last_loss}
            if self.validation_loss is not None:
                results["final/validation_loss"] = self.validation_loss
            self.metrics.write_hyperparameters(dump_config(self.config), results)
            self.metrics.close()

"""Define the training loop, which is the same for every backend."""

import logging
import math
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.backends import Backend
from pipeline.checkpoint.background import BackgroundSaver
from pipeline.checkpoint.state import TrainingState
from pipeline.checkpoint.verification import newest_good_checkpoint
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.data.loader import Prefetcher, TrainLoader
from pipeline.distributed.failure import failures_reported
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, EvaluationStopped, Interrupted
from pipeline.evaluation.tasks import Prepared
from pipeline.hardware.device import GIB, LateValue, PeakMemory, device_name
from pipeline.model.gpt2 import parameter_count
from pipeline.run_folder.heartbeat_file import HeartbeatFile
from pipeline.run_folder.metrics import MEAN_LOSS_KEY
from pipeline.training.due_evaluation import with_recorded_evaluation
from pipeline.training.early_stop import early_stop_reason
from pipeline.training.evaluation import evaluate_model
from pipeline.training.gradient_accumulation import GradientAccumulator
from pipeline.training.group_norms import GroupNorms
from pipeline.training.interruption import StopRequest
from pipeline.training.provenance import describe_process
from pipeline.training.rank_comparison import RankComparison
from pipeline.training.resuming import load_checkpoint
from pipeline.training.run_record import RunRecord
from pipeline.training.schedule import ema_decay_at, lr_at
from pipeline.training.step_guard import StepGuard, StepVerdict, TrainedStep
from pipeline.training.step_profile import StepProfile
from pipeline.training.throughput import ThroughputMeter, measure_ceiling
from pipeline.training.uploads import create_mirror, start_uploads

log = logging.getLogger(__name__)


class Trainer:
    """Trains a model from a given state to step ``schedule.max_steps``.

    :func:`pipeline.training.run.train` creates a trainer from a config. Only ``fit`` writes into the run folder. Before
    this call, ``prepare_run_folder`` must prepare the folder.

    Args:
        state: the progress of the run. The weights and the optimizer state in the backend must belong to this progress.
        tasks: the prepared tasks of ``evaluation.tasks``, without ``validation``.
        origin: the path and the step of the stored weights from which a new run starts. None for random weights.
        changes: the config keys that have changed since the checkpoint from which the run continues, as texts.
        heartbeat_file: writes ``heartbeat.json``. If None, the trainer does not write this file.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        backend: Backend,
        loader: TrainLoader,
        throughput: ThroughputMeter,
        state: TrainingState,
        tasks: Mapping[str, Prepared],
        origin: dict[str, Any] | None = None,
        heartbeat_file: HeartbeatFile | None = None,
        changes: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.origin = origin
        self.changes = changes
        self.world = world
        self.backend = backend
        self.plan = loader.plan
        self.loader = loader
        self.prefetcher = Prefetcher(loader, world.device)
        self.accumulator = GradientAccumulator(backend, loader, config, world)
        self.throughput = throughput
        self.rank_comparison = RankComparison(backend.step_clock, world, config.logging.slow_rank_ratio)
        self.peak_memory = PeakMemory(world.device)
        self.state = state
        self.tasks = tasks
        self.run_folder = Path(config.run.out_dir)
        self.guard = StepGuard(config.guard, state.guard)
        self.stop_request = StopRequest(world)
        self.mirror = create_mirror(config, world)
        self.saver = BackgroundSaver(
            self.run_folder,
            dump_config(config),
            backend,
            world,
            keep_last=config.checkpoint.keep_last,
            asynchronous=config.checkpoint.asynchronous,
            mirror=self.mirror,
        )
        self.heartbeat_file = heartbeat_file or HeartbeatFile(None)
        self.record = RunRecord(config)
        self.profile = StepProfile(self.run_folder, world.device, config.logging.profile_steps, is_main=world.is_main)
        self._steps_here = 0  # in this process
        self._has_evaluated = False  # in this process; the first time may compile
        self._layer_norms: dict[str, float] = {}  # of the newest step, if it was due
        self._recent_losses: list[LateValue] = []  # of the steps since the last training row
        self.results: dict[str, float] = {}  # the latest losses

    def fit(self) -> None:
        """Train until the last step or an early stop, with evaluations and checkpoints.

        Raises:
            TrainingError: too many steps were skipped or were spikes.
            CheckpointError: the last checkpoint could not be written, or contains NaN or infinite numbers. The errors
                of earlier saves are only logged.
            Interrupted: a signal asked the run to stop before its end. A checkpoint was saved, unless no step was
                trained.
        """
        ended = "failed"
        try:
            with failures_reported(self.world), self.stop_request.listening(), self.profile.recording():
                received = self._train()
                self._finish_save()
                if not received:
                    self._finish_uploads()
            is_finished = not received or (self._is_complete() and not self.state.evaluation_is_due)
            ended = "finished" if is_finished else "interrupted"
        finally:
            self._close(ended)
        if received:
            self._finish_uploads()  # the launcher may kill this process during the wait
        if received and is_finished:
            log.info("%s received in the last step: the run is complete", received.name)
        elif received:
            step, max_steps = self.state.step, self.config.schedule.max_steps
            saved = f"after step {step} of {max_steps}, the checkpoint is saved"
            place = saved if step else "before the first step, nothing to save"
            raise Interrupted(
                f"{received.name} received: stopped {place}; run the same command again to continue", received
            )

    def _train(self) -> signal.Signals | None:
        """Run the training loop. Returns a signal that has arrived, or None. The signal ends the loop."""
        self._start_record()
        received = self._evaluate_at_start()
        self.throughput.restart()
        while not received and not self._is_complete():
            received = self._run_step()
        if reason := self._early_stop_reason():
            log.info("stopped after step %d of %d: %s", self.state.step, self.config.schedule.max_steps, reason)
        return received

    def _evaluate_at_start(self) -> signal.Signals | None:
        """Evaluate before the first step, or repeat an evaluation that a signal stopped in an earlier process.

        Returns a signal that has arrived, or None.
        """
        if self.state.step == 0:
            self.evaluate()
        else:
            self._finish_due_evaluation()
        return self.stop_request.agreed()

    def _finish_due_evaluation(self) -> None:
        """If a signal stopped the evaluation of this step, take its results from the metrics, or repeat it.

        This does not save another checkpoint of the step: replacing a checkpoint is not safe at any moment.
        """
        if self.state.evaluation_is_due:
            self.state = self.world.call_on_main(lambda: with_recorded_evaluation(self.state, self.run_folder))
        if self.state.evaluation_is_due:
            self.evaluate()

    def _run_step(self) -> signal.Signals | None:
        """Train one step. Then log, evaluate or save if this is due.

        Returns a signal that has arrived, or None.
        """
        config = self.config
        with self.backend.step_clock.step():
            trained = self.train_step()
        self._profile_step()
        self.record.count_step(trained.step)
        received = self.stop_request.agreed()
        saves = received is not None or self._is_due(config.checkpoint.every_steps) or self._is_milestone()
        evaluates = self._is_due(config.evaluation.every_steps)
        logs = saves or self.state.step == 1 or self._is_due(config.logging.every_steps)
        for spike in self._judge_finished_steps(judge_all=logs or evaluates):
            if self._roll_back(spike):
                # The next step saves, but it would drop an evaluation that a signal has stopped.
                return self.stop_request.agreed() if self.state.evaluation_is_due else None
        if self._layer_norms:
            self.record.write({"step": trained.step, **self._layer_norms})
        if logs:
            self.log_step(trained)
        if evaluates:
            self.evaluate()
            received = received or self.stop_request.agreed()
        self.record.write_saves(self.saver.poll())
        self._write_uploads()
        if saves or received or (evaluates and self._saves_after_evaluation()):
            self.save()
        return received

    def _finish_save(self) -> None:
        self._reach_rare("the save of the last checkpoint")
        self.heartbeat_file.enter("saving", self.state.step)
        for outcome in self.saver.wait():
            self.record.write_saves([outcome])
            if outcome.failure:
                raise CheckpointError(outcome.failure)

    def _close(self, ended: str) -> None:
        self._reach_rare("the end of the run")
        self.guard.log_steps_without_targets()
        self.prefetcher.close()
        self.record.write_saves(self.saver.wait())  # finish and verify an unfinished save, also after an error
        self._write_uploads()
        self.record.close(self.state.step, ended, self.results)
        self.heartbeat_file.enter(ended, self.state.step)

    def _is_complete(self) -> bool:
        return self.state.step >= self.config.schedule.max_steps or self._early_stop_reason() is not None

    def _write_uploads(self) -> None:
        if self.mirror:
            self.record.write_uploads(self.mirror.poll())

    def _finish_uploads(self) -> None:
        if self.mirror:
            self._reach_rare("the upload of the last checkpoint")
            self.record.write_uploads(self.mirror.finish(self.world.progress.move), then="the next start tries again")

    def _start_record(self) -> None:
        """Start to record the run in the run folder and at the URL ``checkpoint.remote``."""
        self.world.call_on_main(lambda: self.record.start(self.state.step))
        if self.mirror:
            start_uploads(self.mirror)
        started = {
            "backend": self.backend.describe(),
            "world_size": self.world.size,
            "device": device_name(self.world.device),
            "parameters": parameter_count(self.config.model),
            **({} if self.origin is None else {"init_from": self.origin}),
            **({"changed": list(self.changes)} if self.changes else {}),
            **(describe_process() if self.world.is_main else {}),
        }
        self.record.write({"step": self.state.step, "started": started})

    def _is_due(self, every_steps: int) -> bool:
        return self.state.step % every_steps == 0 or self.state.step == self.config.schedule.max_steps

    def _is_milestone(self) -> bool:
        every_steps = self.config.checkpoint.keep_every_steps
        return every_steps is not None and self.state.step % every_steps == 0

    def _early_stop_reason(self) -> str | None:
        return early_stop_reason(self.config.schedule, self.state.validation)

    def _saves_after_evaluation(self) -> bool:
        """Return whether the evaluation of this step found the best loss, or ends the run."""
        is_best = self.state.validation.best_step == self.state.step
        return self.config.checkpoint.keep_best and is_best or self._early_stop_reason() is not None

    def _reach_rare(self, phase: str) -> None:
        """Tell the heartbeat that a rare and long phase begins, such as a save."""
        self.world.progress.reach(phase, is_patient=True, repeats=False)

    def _reach_of_step(self, phase: str) -> None:
        """Tell the heartbeat that a phase of a step begins. The first step takes longer, because it compiles."""
        self.world.progress.reach(phase, is_patient=self._steps_here < 2, repeats=self._steps_here > 0)

    def _reach_in_step(self, activity: str) -> None:
        self._reach_of_step(f"step {self.state.step + 1}, {activity}")

    def _announce_compilation(self, purpose: str) -> None:
        """Log that the next forward pass compiles the model, so that a silent minute does not look like a hang."""
        if self.config.run.compiles:
            log.info("compile   the model for %s; this can take a few minutes", purpose)

    def train_step(self) -> TrainedStep:
        """Queue one optimizer step on the device, without waiting for its result."""
        self.heartbeat_file.enter("training", self.state.step)
        if self._steps_here == 0:
            self._announce_compilation("training")
        first_sample = self.guard.next_sample(self.state.samples, self.plan.samples_per_step)
        self._reach_in_step("waiting for data")
        with self.throughput.waiting_for_data(), self.backend.step_clock.waiting_for_data():
            micro_batches = self.prefetcher.micro_batches(first_sample)
        loss_scale = self.backend.loss_scaler.scale
        loss, scored_targets = self.accumulator.run(micro_batches, self._reach_in_step)
        learning_rate = lr_at(self.state.step, self.config.optimizer, self.config.schedule)
        self._reach_in_step("optimizer")
        grad_norm = self._update(learning_rate)
        self.throughput.count_step()
        self._advance(first_sample)
        self._steps_here += 1
        step, stop_sample = self.state.step, self.state.samples
        trained = TrainedStep(
            step, first_sample, stop_sample, loss, grad_norm, loss_scale, learning_rate, scored_targets
        )
        self.guard.enqueue(trained)
        self._recent_losses.append(loss)
        return trained

    def _profile_step(self) -> None:
        """Count the newest step for the profile. All ranks wait while the main rank writes the profile.

        Otherwise, the wait of the other ranks would count as a time of the next step.
        """
        if not self.profile.takes_long_after(self._steps_here):
            self.profile.count_step()
            return
        with self.throughput.paused(), self.world.progress.patience():
            self.profile.count_step()
            self.world.barrier()

    @contextmanager
    def _clocks_paused(self) -> Iterator[None]:
        """Return a context manager. The time inside its block does not count as a time of training."""
        with self.throughput.paused(), self.backend.step_clock.paused():
            yield

    def _update(self, learning_rate: float) -> LateValue:
        self._layer_norms = {}
        ema_decay = ema_decay_at(self.state.step, self.config.averaging)
        every_steps = self.config.logging.norms_every_steps
        if every_steps == 0 or (self.state.step + 1) % every_steps:
            return LateValue(self.backend.step(learning_rate, ema_decay))
        with self._clocks_paused():
            norms = GroupNorms(self.backend, self.config.optimizer, self.world)
        grad_norm = LateValue(self.backend.step(learning_rate, ema_decay))
        with self._clocks_paused():
            self._layer_norms = norms.measure(grad_norm.read())
        return grad_norm

    def _advance(self, first_sample: int) -> None:
        loss_scale, good_steps = self.backend.loss_scaler.state
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            samples=first_sample + self.plan.samples_per_step,
            tokens=self.state.tokens + self.plan.tokens_per_step,
            loss_scale=loss_scale,
            loss_scale_good_steps=good_steps,
            evaluation_is_due=False,
        )

    def _judge_finished_steps(self, *, judge_all: bool) -> Iterator[TrainedStep]:
        """Judge the steps that the device has finished, and yield the steps that spiked.

        On a GPU, the newest step is left for the next call, so that this call does not wait. If ``judge_all`` is True,
        this call also judges the newest step.
        """
        leave = 1 if self.world.device.type == "cuda" and not judge_all else 0
        for finished, verdict in self.guard.judge_queued(leave=leave):
            if verdict is StepVerdict.SPIKE:
                yield finished
            if verdict is StepVerdict.SKIPPED:
                samples = [finished.first_sample, finished.stop_sample]
                self.record.write({"step": finished.step, "skipped_samples": samples})
            else:
                self.state = replace(self.state, updates=self.state.updates + 1)

    def _roll_back(self, spike: TrainedStep) -> bool:
        """Load the newest good checkpoint and skip the samples of a spike. Returns False if there is no checkpoint.

        Every rank must call this.
        """
        self._reach_rare(f"rollback after step {self.state.step}")
        self.record.write_saves(self.saver.wait())
        folder = self.world.call_on_main(lambda: newest_good_checkpoint(self.run_folder))
        if folder is None:
            log.warning("no checkpoint yet to roll back to: training continues")
            return False
        before, loaded = self.state, load_checkpoint(folder, self.backend, self.world)
        # As in load_start, these are the values of this start. The checkpoint can be of other data or lack the values.
        self.state = replace(loaded, seed=before.seed, data_sha256=before.data_sha256, tokenizer=before.tokenizer)
        self.guard.after_rollback(self.state.guard, spike)
        log.warning("rolled back to %s; %s are left out", folder, spike.describe_samples())
        self.record.rewind(self.state.step)
        self._recent_losses.clear()
        self._finish_due_evaluation()
        samples = [spike.first_sample, spike.stop_sample]
        self.record.write({"step": self.state.step, "left_out_samples": samples})
        self.throughput.restart()
        return True

    def log_step(self, trained: TrainedStep) -> None:
        """Write a row of metrics about a step, after the device has finished the step."""
        self._reach_of_step(f"the log of step {trained.step}")
        self.rank_comparison.start()
        speed = self.throughput.read()  # waits for the device
        loss, mean_loss = trained.loss.read(), self._mean_recent_loss()
        row: dict[str, Any] = {
            "step": trained.step,
            "loss": loss,
            MEAN_LOSS_KEY: mean_loss,
            "lr": trained.learning_rate,
            "grad_norm": trained.grad_norm.read(),
            "tokens": self.state.tokens,
            **speed,
            **self.rank_comparison.read(),
            "peak_memory_gib": self.peak_memory.read() / GIB,
            "skipped_steps": self.state.step - self.state.updates,
        }
        if self.loader.has_mask:
            row["scored_targets"] = int(trained.scored_targets.read())
        if row.get("scored_targets", 1):
            self.results["loss"] = loss
        if mean_loss is not None:
            self.results[MEAN_LOSS_KEY] = mean_loss
        if self.backend.loss_scaler.dynamic:
            row["loss_scale"] = self.backend.loss_scaler.scale
        self.record.write(row)
        if self.rank_comparison.finds_slow_network():
            with self.throughput.paused(), self.world.progress.patience():
                self.rank_comparison.log_links()

    def _mean_recent_loss(self) -> float | None:
        """Return the mean of the finite losses since the previous call, or None if there are no such losses."""
        losses = [loss for late in self._recent_losses if math.isfinite(loss := late.read())]
        self._recent_losses.clear()
        return statistics.fmean(losses) if losses else None

    def evaluate(self) -> None:
        """Evaluate the model with ``evaluate_model``, and log the results.

        If a signal stops the evaluation, its results are dropped, and the next start of the run repeats it.

        Every rank must call this.
        """
        self.heartbeat_file.enter("evaluating", self.state.step)
        self.world.progress.reach(f"evaluation after step {self.state.step}", is_patient=not self._has_evaluated)
        if not self._has_evaluated and any(dataset.validation for dataset in self.loader.datasets):
            self._announce_compilation("validation")
        with self.throughput.paused():
            self._check_ceiling()
            before_batch = self.stop_request.stop_evaluation
            try:
                rows = evaluate_model(
                    self.backend, self.loader.datasets, self.tasks, self.config, self.world, before_batch
                )
            except EvaluationStopped:
                self.state = replace(self.state, evaluation_is_due=True)
                log.warning("the evaluation of step %d was stopped; the next start repeats it", self.state.step)
                return
        self._has_evaluated = True
        self.state = replace(self.state, evaluation_is_due=False)
        for row in rows:
            self.record.write({"step": self.state.step, "tokens": self.state.tokens, **row})
            if (loss := row.get("val_loss")) is not None:
                self.results["validation_loss"] = loss
                self.state = replace(self.state, validation=self.state.validation.after(self.state.step, loss))

    def _check_ceiling(self) -> None:
        """Measure ``ceiling_flops`` again, because other programs may have disturbed the earlier measurement."""
        if 0 < self.state.step < self.config.schedule.max_steps:
            with self.peak_memory.ignored():
                self.throughput.raise_ceiling(measure_ceiling(self.world, self.config))

    def save(self) -> None:
        """Save a checkpoint. This call copies the state, and a thread writes the copy.

        Every rank must call this.
        """
        self.heartbeat_file.enter("saving", self.state.step)
        self._reach_rare(f"save of step {self.state.step}")
        with self.throughput.paused():
            self.backend.model.assert_tied()
            self.record.write_saves(self.saver.start(replace(self.state, guard=self.guard.state)))

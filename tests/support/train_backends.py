"""Train several backends one after the other in one world, and write their numbers. Started on several ranks by tests.

python tests/support/train_backends.py CASES.json OUT.json        # a list of ``Case`` as JSON, and the results by name

A case trains ``STEPS`` steps on random tokens. All cases train on the same micro-batches at every world size.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from launch.cli import run_command
from pipeline.backends import Backend, create_backend
from pipeline.checkpoint.layout import checkpoint_folder
from pipeline.checkpoint.loading import load_training_state
from pipeline.checkpoint.state import TrainingState
from pipeline.config.loading import load_config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.world import World, join_world
from pipeline.model import blocked_loss
from pipeline.model.gpt2 import allocate_model, build_model
from tests.support.checkpoints import save_checkpoint
from tests.support.runs import CONFIGS, Sections, merged, overrides, split_config

SEED = 1  # of the initial weights
STEPS, SAVED_AT = 4, 2
MICRO_BATCHES = 12  # per step, a multiple of 1, 2, 3 and 4 ranks
BATCH_SIZE, SEQ_LEN, VOCAB_SIZE = 1, 8, 89

#: No size divides another. Of nine positions, three of four ranks hold three each, and the last one holds none.
SECTIONS: Sections = {
    "run": {"precision": "fp32", "device": "cpu"},
    "model": {"n_layer": 2, "n_head": 3, "n_embd": 21, "context_length": 9, "vocab_size": VOCAB_SIZE},
    "data": {"seq_len": SEQ_LEN},
    "batch": {"tokens_per_step": MICRO_BATCHES * BATCH_SIZE * SEQ_LEN, "micro_batch_size": BATCH_SIZE},
    "optimizer": {"learning_rate": 1e-2, "grad_clip": 0.5},
    "schedule": {"warmup_steps": 1, "max_steps": STEPS},
}


@dataclass(frozen=True)
class Case:
    name: str
    config: str  # the name of a file in ds_configs, with or without the size of a group, as in ``curve_of``
    sections: Sections = field(default_factory=dict)
    start: str | None = None  # the checkpoint to continue from
    save_to: str | None = None  # a run folder for a checkpoint of step ``SAVED_AT``
    bad_step: int | None = None  # the step in which the loss of one micro-batch is NaN


@dataclass(frozen=True)
class Result:
    losses: list[float]  # per step, the mean over the targets
    grad_norms: list[float]
    again: list[float]  # the losses of the steps after ``SAVED_AT``, trained again after a return to the checkpoint
    validation: list[float]  # the loss of one micro-batch after the last step, and after the return to the checkpoint
    digests: list[dict[str, str]]  # per rank, SHA-256 of each fragment's weights and optimizer state
    updates: int


def read_results(path: Path) -> dict[str, Result]:
    return {name: Result(**values) for name, values in json.loads(path.read_text()).items()}


def main() -> list[Backend]:
    """Return the backends, which ``run_command`` keeps in memory."""
    cases = [Case(**values) for values in json.loads(Path(sys.argv[1]).read_text())]
    backends, results = [], {}
    blocked_loss.BLOCK_COLUMNS = 24  # the tiny vocabulary needs several blocks
    with join_world(load_config([CONFIGS / "ddp.json"], overrides(SECTIONS)).run) as world:
        for case in cases:
            trainee = _Trainee(case, world)
            results[case.name] = asdict(trainee.run())
            backends.append(trainee.backend)
        world.barrier()
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(results))
    return backends


class _Trainee:
    def __init__(self, case: Case, world: World) -> None:
        self.case, self.world = case, world
        file, groups = split_config(case.config)
        config = load_config([CONFIGS / f"{file}.json"], overrides(merged(SECTIONS, groups, case.sections)))
        self.dropout = config.model.dropout
        self.learning_rate = config.optimizer.learning_rate
        model = allocate_model(config.model, "meta")
        self.backend = create_backend(model, config, world, plan_batch(config, world.size))
        self.updates = 0
        if case.start is None:
            self.backend.draw_weights(SEED)
            self._check_initial_weights()

    def _check_initial_weights(self) -> None:
        """Check that this rank's weights are bit-identical to the same ranges of an undivided model."""
        whole = dict(build_model(self.backend.model.config, SEED).named_parameters())
        for held in self.backend.state.ranges():
            expected = whole[held.name].detach().view(-1)[held.start : held.stop]
            assert torch.equal(held.of(held.master), expected), (self.case.name, self.world.rank, held.name)

    def run(self) -> Result:
        losses, grad_norms, again, validation = [], [], [], []
        first = self._load(Path(self.case.start)) if self.case.start else 0
        for step in range(first, STEPS):
            loss, norm = self._train_step(step)
            losses.append(loss)
            grad_norms.append(norm)
            if self.case.save_to and step + 1 == SAVED_AT:
                self._save(step + 1)
        validation.append(self._validate())
        digests = self.world.gather(self._digests())
        updates = self.updates
        if self.case.save_to:
            self._load(checkpoint_folder(Path(self.case.save_to), SAVED_AT))
            validation.append(self._validate())
            again = [self._train_step(step)[0] for step in range(SAVED_AT, STEPS)]
        return Result(losses, grad_norms, again, validation, digests, updates)

    def _train_step(self, step: int) -> tuple[float, float]:
        """Train one step, and return the mean loss of all ranks and the gradient norm."""
        total = torch.zeros((), dtype=torch.float64)
        own = range(self.world.rank, MICRO_BATCHES, self.world.size)
        weight = self.world.size / (MICRO_BATCHES * BATCH_SIZE * SEQ_LEN)
        for i in own:
            tokens, targets = micro_batch(step * MICRO_BATCHES + i)
            torch.manual_seed(step * MICRO_BATCHES + i)  # for dropout
            is_bad = step == self.case.bad_step and i == MICRO_BATCHES - 1
            factor = float("nan") if is_bad else weight
            total += self.backend.accumulate(tokens, targets, factor, is_last=i == own[-1])
        norm = float(self.backend.step(self.learning_rate))
        self.updates += math.isfinite(norm)
        return self.world.sum(total).item() / (MICRO_BATCHES * BATCH_SIZE * SEQ_LEN), norm

    def _validate(self) -> float:
        with self.backend.evaluation_mode():
            return self.backend(*micro_batch(-1), method="loss").item()

    def _save(self, step: int) -> None:
        assert self.case.save_to
        folder, scaler = Path(self.case.save_to), self.backend.loss_scaler.state
        samples = step * MICRO_BATCHES * BATCH_SIZE
        state = TrainingState(step, samples, samples * SEQ_LEN, self.updates, *scaler, seed=1)
        if self.world.is_main:
            folder.mkdir(parents=True)
        self.world.barrier()
        save_checkpoint(folder, state, {}, self.backend, self.world, keep_last=1)

    def _load(self, folder: Path) -> int:
        state = load_training_state(folder, self.backend)
        self.updates = state.updates
        return state.step

    def _digests(self) -> dict[str, str]:
        return {
            f"{fragment.name}[{fragment.start}] {kind}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            for fragment in self.backend.fragments()
            for kind, tensor in fragment.tensors.items()
        }


def micro_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and targets, (BATCH_SIZE, SEQ_LEN) each."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    tokens = torch.randint(VOCAB_SIZE, (BATCH_SIZE, SEQ_LEN + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


if __name__ == "__main__":
    run_command(main)

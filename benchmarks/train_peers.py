"""Train transformers' GPT-2 as its users do, on the batches and from the weights of this project.

:mod:`benchmarks.train` runs this script in separate processes: a plain loop, or Hugging Face's ``Trainer``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Sampler, SequentialSampler

from benchmarks.train_setting import Setting
from benchmarks.transformers_model import transformers_model
from pipeline.backends.optimizer import build_adamw, set_learning_rate
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.data.datasets import open_datasets
from pipeline.data.loader import TrainLoader
from pipeline.distributed.cpu import share_cores
from pipeline.distributed.world import World, join_world
from pipeline.hardware.device import GIB, peak_memory_bytes
from pipeline.model.gpt2 import build_model
from pipeline.training.schedule import lr_at

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class RowClock:
    """Writes a row after the first step and then every ``steps_per_row`` steps, as this project's trainer does.

    Args:
        path: the file for the rows. It is None on ranks that only take part in the sums over ranks.
    """

    def __init__(self, setting: Setting, world: World, path: Path | None) -> None:
        self.setting, self.world, self.path = setting, world, path
        self.started, self.counted = time.perf_counter(), 0

    def count(self, loss: Tensor) -> None:
        """Count a queued step. ``loss`` is the mean loss of this rank, on the device."""
        self.counted += 1
        step = self.counted
        if step != 1 and step % self.setting.steps_per_row:
            return
        value, now = self.world.sum(loss).item() / self.world.size, time.perf_counter()
        steps = 1 if step <= self.setting.steps_per_row else self.setting.steps_per_row
        if self.path:
            peak_gib, step_ms = peak_memory_bytes(self.world.device) / GIB, (now - self.started) * 1e3 / steps
            with self.path.open("a", encoding="utf-8") as rows:
                print(
                    json.dumps({"step": step, "loss": value, "step_ms": step_ms, "peak_memory_gib": peak_gib}),
                    file=rows,
                )
        self.started = time.perf_counter()


def batches(config: Config, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's inputs and targets of each step, (B, T) int64 in host memory."""
    plan = plan_batch(config, world.size)
    loader = TrainLoader(open_datasets(config), plan, config.run.seed, world.rank)
    for step in range(config.schedule.max_steps):
        (micro_batch,) = loader.micro_batches(step * plan.samples_per_step)
        yield micro_batch.to(torch.device("cpu"))


def build_peer(config: Config) -> Any:
    """Return a ``GPT2LMHeadModel`` with the initial weights of this project."""
    model = build_model(config.model, config.run.seed)
    return transformers_model(model, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)


def plain_loop(config: Config, world: World, clock: RowClock, *, compiled: bool) -> None:
    """Train with the loop in the documentation of transformers."""
    model = build_peer(config).to(world.device).train()
    module = DistributedDataParallel(model) if world.size > 1 else model
    if compiled:
        module.compile(dynamic=False)
    optimizer = build_adamw(model.parameters(), config.optimizer, world.device)
    for step, (inputs, targets) in enumerate(batches(config, world)):
        inputs, targets = (t.to(world.device, non_blocking=True) for t in (inputs, targets))
        set_learning_rate(optimizer.param_groups, lr_at(step, config.optimizer, config.schedule))
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.run.precision != "fp32"):
            loss = module(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.count(loss.detach())


class Windows(Dataset[dict[str, Tensor]]):
    """A dataset for ``Trainer``. ``Trainer`` gives whole batches to the ranks in turn.

    A rank stores only its own batches.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.size, self.world_size = config.batch.micro_batch_size, world.size
        self.rows = [row for inputs, targets in batches(config, world) for row in zip(inputs, targets, strict=True)]

    def __len__(self) -> int:
        return len(self.rows) * self.world_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch, place = divmod(index, self.size)
        inputs, targets = self.rows[(batch // self.world_size) * self.size + place]
        return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


class TimedTrainer(transformers.Trainer):
    """A ``Trainer`` that reads samples in order and keeps the last loss."""

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        assert isinstance(self.train_dataset, Windows)
        return SequentialSampler(self.train_dataset)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        self.last_loss = super().training_step(*arguments, **options)
        return self.last_loss


def hugging_face_trainer(config: Config, world: World, clock: RowClock, folder: Path, *, compiled: bool) -> None:
    """Train the same steps with ``transformers.Trainer``."""
    on_cpu = world.device.type == "cpu"
    model = build_peer(config)
    optimizer = build_adamw(model.parameters(), config.optimizer, world.device)

    def lr_factor(step: int) -> float:
        return lr_at(step, config.optimizer, config.schedule) / config.optimizer.learning_rate

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch.micro_batch_size,
        max_steps=config.schedule.max_steps,
        max_grad_norm=config.optimizer.grad_clip,
        bf16=config.run.precision != "fp32",
        torch_compile=compiled,
        use_cpu=on_cpu,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_backend=None if world.size == 1 else "gloo" if on_cpu else "nccl",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        seed=config.run.seed,
    )
    trainer = TimedTrainer(
        model=model,
        args=arguments,
        train_dataset=Windows(config, world),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)),
    )
    optimizer.register_step_post_hook(lambda *_: clock.count(trainer.last_loss.detach()))
    clock.started = time.perf_counter()
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["loop", "trainer"])
    parser.add_argument("setting", type=Setting.from_json)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--eager", action="store_true")
    arguments = parser.parse_args()
    setting: Setting = arguments.setting
    config = setting.config()
    with join_world(config.run, process_group=setting.processes > 1) as world:
        if world.size == 1:
            for name in LAUNCHER_VARIABLES:  # join_world sets them, and Trainer would wrap the model in DDP
                os.environ.pop(name)
        if world.device.type == "cpu":
            share_cores(world)
        clock = RowClock(setting, world, arguments.rows if world.is_main else None)
        if arguments.kind == "loop":
            plain_loop(config, world, clock, compiled=not arguments.eager)
        else:
            hugging_face_trainer(config, world, clock, arguments.rows.parent / "out", compiled=not arguments.eager)


if __name__ == "__main__":
    main()

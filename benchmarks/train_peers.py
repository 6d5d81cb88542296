"""transformers' GPT-2, trained as its users train it, on the batches and from the weights that this project has.

Run as a script by :mod:`benchmarks.train`, in processes of its own: a plain loop, or Hugging Face's ``Trainer``; each
with bf16 autocast, fused AdamW and torch.compile, or eager.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.train_setting import Setting, write_row
from pipeline.batch_plan import plan_batch
from pipeline.config import Config
from pipeline.cores import take_share_of_cores
from pipeline.distributed import World, join_world
from pipeline.hardware import peak_memory_bytes
from pipeline.loader import TrainLoader
from pipeline.model import build_model
from pipeline.optimizer import build_adamw, set_learning_rate
from pipeline.precision import autocast
from pipeline.schedule import lr_at
from pipeline.training_data import open_parts

GIB = 1 << 30


class RowClock:
    """Writes a row once in ``steps_per_row`` steps, as the trainer of this project does."""

    def __init__(self, setting: Setting, device: torch.device, path: Path | None) -> None:
        self.setting, self.device, self.path = setting, device, path
        self.started, self.first = time.perf_counter(), 1

    def count(self, step: int, loss: Callable[[], float]) -> None:
        """Step ``step`` was queued; ``loss`` waits for it."""
        if step % self.setting.steps_per_row and step != 1:
            return
        value, now = loss(), time.perf_counter()
        milliseconds = (now - self.started) * 1e3 / (step - self.first + 1)
        if self.path:
            peak_gib = peak_memory_bytes(self.device) / GIB
            write_row(self.path, step=step, loss=value, step_ms=milliseconds, peak_memory_gib=peak_gib)
        self.started, self.first = time.perf_counter(), step + 1


def batches(config: Config, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's inputs and targets, (B, T) int64 in host memory, step by step."""
    plan = plan_batch(config, world.size)
    loader = TrainLoader(open_parts(config.data, config.model), plan, config.run.seed, world.rank)
    for step in range(config.schedule.max_steps):
        (micro_batch,) = loader.micro_batches(step * plan.samples_per_step)
        yield micro_batch.to(torch.device("cpu"))


def build_peer(config: Config) -> Any:
    """``GPT2LMHeadModel`` with the weights that this project starts from."""
    import transformers  # takes seconds, and is an extra

    sizes = config.model
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=sizes.vocab_size,
            n_positions=sizes.context_length,
            n_embd=sizes.n_embd,
            n_layer=sizes.n_layer,
            n_head=sizes.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )
    weights = {}
    for name, weight in build_model(sizes, config.run.seed).state_dict().items():
        if name in ("wte.weight", "lm_head.weight"):
            weight = weight[: sizes.vocab_size]
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.T  # its Conv1D keeps (inputs, outputs)
        weights[name if name == "lm_head.weight" else f"transformer.{name}"] = weight
    model.load_state_dict(weights)
    model.tie_weights()
    return model


def plain_loop(config: Config, world: World, clock: RowClock, *, compiled: bool) -> None:
    """Forward with labels, backward, clip, step: what the documentation of transformers shows."""
    model = build_peer(config).to(world.device).train()
    module = DistributedDataParallel(model) if world.size > 1 else model
    if compiled:
        module.compile(dynamic=False)
    optimizer = build_adamw(model.parameters(), config.optimizer, world.device)
    lowest = "fp32" if config.run.precision == "fp32" else "amp_bf16"
    for step, (inputs, targets) in enumerate(batches(config, world)):
        inputs, targets = (part.to(world.device, non_blocking=True) for part in (inputs, targets))
        set_learning_rate(optimizer.param_groups, lr_at(step, config.optimizer, config.schedule))
        with autocast(lowest, world.device):
            loss = module(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.count(step + 1, lambda loss=loss: world.sum(loss.detach()).item() / world.size)


def hugging_face_trainer(config: Config, world: World, clock: RowClock, folder: Path, *, compiled: bool) -> None:
    """The same steps by ``transformers.Trainer``, with its own loop, autocast and compilation."""
    import transformers

    class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
        """Each rank's sampler takes every n-th sample in order: stored so that a rank gets its own micro-batch."""

        def __init__(self) -> None:
            self.rows = [row for inputs, targets in batches(config, world) for row in zip(inputs, targets, strict=True)]

        def __len__(self) -> int:
            return len(self.rows) * world.size

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            inputs, targets = self.rows[self._own(index)]
            return {"input_ids": inputs, "labels": targets, "shift_labels": targets}

        def _own(self, index: int) -> int:
            batch, place = divmod(index, config.batch.micro_batch_size)
            return (batch // world.size) * config.batch.micro_batch_size + place

    class Clock(transformers.TrainerCallback):
        """Trainer has no loss to give but the one it logs, so that is kept from the model's own call."""

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            clock.count(state.global_step, lambda: world.sum(losses[-1]).item() / world.size)
            losses.clear()

    class Sequential(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(model, inputs, *arguments, **options)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).detach().clone())
            return loss

    losses: list[Tensor] = []
    model = build_peer(config)
    optimizer = build_adamw(model.parameters(), config.optimizer, world.device)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_at(step, config.optimizer, config.schedule) / config.optimizer.learning_rate
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch.micro_batch_size,
        max_steps=config.schedule.max_steps,
        max_grad_norm=config.optimizer.grad_clip,
        bf16=config.run.precision != "fp32",
        torch_compile=compiled,
        use_cpu=world.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_backend="gloo" if world.device.type == "cpu" else "nccl",
        remove_unused_columns=False,
        dataloader_pin_memory=world.device.type == "cuda",
        seed=config.run.seed,
    )
    trainer = Sequential(
        model=model, args=arguments, train_dataset=Windows(), optimizers=(optimizer, schedule), callbacks=[Clock()]
    )
    trainer.train()


def main() -> None:
    """Train one peer and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["loop", "trainer"])
    parser.add_argument("setting", type=Setting.from_json)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--eager", action="store_true")
    arguments = parser.parse_args()
    setting: Setting = arguments.setting
    config = setting.config()
    with join_world(config.run, process_group=setting.processes > 1) as world:
        if world.device.type == "cpu":
            take_share_of_cores(world)
        clock = RowClock(setting, world.device, arguments.rows if world.is_main else None)
        if arguments.kind == "loop":
            plain_loop(config, world, clock, compiled=not arguments.eager)
        else:
            hugging_face_trainer(config, world, clock, arguments.rows.parent / "out", compiled=not arguments.eager)


if __name__ == "__main__":
    main()

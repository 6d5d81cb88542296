"""Train a few steps with a config's backend on random tokens, or only start a run. Write the peak memory.

python benchmarks/memory_rank.py OUT.json --config FILE ... --set ...        # under torchrun, or alone
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

import torch

from launch.cli import run_command
from benchmarks.memory import status_bytes
from pipeline.backends import Backend, create_backend
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.world import World, join_world
from pipeline.model.gpt2 import allocate_model

STEPS = 3  # moments exist from the second step on, DDP's final buckets from the third step on


def main() -> Backend:
    """Write the largest peak of all ranks. Returns the backend, which ``run_command`` keeps in memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=STEPS, help="the number of steps after the weights are set")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    with join_world(config.run) as world:
        _train(_tiny(config), world, STEPS)  # so that one-time allocations of libraries are not counted
        gc.collect()
        before = _used_bytes(world.device)
        _reset_peak(world.device)
        held = _train(config, world, arguments.steps)
        largest = max(world.gather(_peak_bytes(world.device) - before))
        if world.is_main:
            arguments.out.write_text(json.dumps({"peak_bytes": largest}))
        held.close()
    return held


def _tiny(config: Config) -> Config:
    """Return the config with a tiny model, the same backend and the same precision."""
    model = config.model.model_copy(update={"n_layer": 1, "n_head": 2, "n_embd": 64, "activation_checkpointing": False})
    return config.model_copy(update={"model": model})


def _train(config: Config, world: World, steps: int) -> Backend:
    """Build the backend as a run does, and train some steps."""
    plan = plan_batch(config, world.size)
    backend = create_backend(allocate_model(config.model, "meta"), config, world, plan)
    backend.draw_weights(config.run.seed)
    shape, weight = (plan.micro_batch_size, plan.seq_len), world.size / plan.tokens_per_step
    for _ in range(steps):
        for i in range(plan.accumulation):
            tokens = torch.randint(config.model.vocab_size, shape, device=world.device)
            backend.accumulate(tokens, tokens, weight, is_last=i == plan.accumulation - 1)
        backend.step(config.optimizer.learning_rate)
    return backend


def _used_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else status_bytes("VmRSS")


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to what is resident now


if __name__ == "__main__":
    run_command(main)

"""Decide whether torch.compile compiles each block separately or the whole model."""

import torch
import torch._dynamo

from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2


def compiles_blocks(world: World) -> bool:
    """Return whether ranks reduce gradients while the backward pass runs, as several GPUs do.

    In one graph for the whole model, all gradients are complete only at its end, so no reduction could start earlier.
    A single process has nothing to reduce. On CPUs the reduction needs the same cores, and one graph is faster.
    """
    return world.size > 1 and world.device.type != "cpu"


def compile_blocks(model: GPT2) -> None:
    """Compile each block and the output layer with its loss by itself, without the hooks of a backend around them.

    All blocks share one graph, so the time to compile does not grow with the depth of the model.
    """
    # DDP's own division of graphs would cut every block that is larger than a bucket. This changes the whole process.
    torch._dynamo.config.optimize_ddp = False
    for module in (*model.h, model.lm_head):
        module.forward = torch.compile(module.forward, dynamic=False)

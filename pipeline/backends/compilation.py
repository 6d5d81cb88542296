"""Decide whether torch.compile compiles each block separately or the whole model."""

import torch
import torch._dynamo

from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2


def compiles_blocks(world: World) -> bool:
    """Return whether each block is compiled separately. This is the case for several ranks on GPUs.

    Several GPUs reduce the gradients of a block while the backward pass continues with the next block. This is possible
    only if each block has its own graph. A graph of the whole model returns all gradients at its end, so all reductions
    would have to wait. A single process has nothing to reduce. On CPUs, the reduction and the backward pass need the
    same cores, so one graph is faster.
    """
    return world.size > 1 and world.device.type != "cpu"


def compile_blocks(model: GPT2) -> None:
    """Compile each block separately, and the output layer together with the loss.

    The compiled graphs do not contain the hooks that a backend adds to these modules. All blocks share one graph, so
    the time to compile does not grow with the number of blocks.
    """
    # DDP's own division of graphs would cut every block that is larger than a bucket. This changes the whole process.
    torch._dynamo.config.optimize_ddp = False
    for module in (*model.h, model.lm_head):
        module.forward = torch.compile(module.forward, dynamic=False)

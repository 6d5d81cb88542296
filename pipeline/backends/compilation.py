"""Decide whether torch.compile compiles each transformer block separately or the whole model at once."""

import torch
import torch._dynamo

from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2


def compiles_blocks(world: World) -> bool:
    """Return whether torch.compile should compile each transformer block separately: True if several ranks use GPUs.

    On several GPUs, the gradients of a block should be reduced while the backward pass continues with other blocks.
    This overlap needs one graph per block, because a graph of the whole model returns all gradients at its end.

    Otherwise, the model is compiled as one graph, which is faster. Overlap would not help: a single process does not
    reduce gradients, and on CPUs, the reduction and the backward pass need the same cores.
    """
    return world.size > 1 and world.device.type != "cpu"


def compile_blocks(model: GPT2) -> None:
    """Compile each block separately. Compile the output layer and the loss together.

    The hooks that a backend adds to the blocks and to the output layer run outside the compiled graphs. torch compiles
    one graph and uses it for all blocks. Therefore, the compilation time does not depend on the number of blocks.
    """
    # DDP's own division of graphs would cut every block that is larger than a bucket. This changes the whole process.
    torch._dynamo.config.optimize_ddp = False
    for module in (*model.h, model.lm_head):
        module.forward = torch.compile(module.forward, dynamic=False)

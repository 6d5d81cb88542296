"""Decide whether torch.compile compiles each transformer block separately or the whole model."""

from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2


def compiles_blocks(world: World) -> bool:
    """Return whether to compile each transformer block separately: True if several ranks use GPUs.

    The backend can then reduce the gradients of one block during the backward pass of another block. On a CPU, or with
    a single rank, one graph of the whole model is faster.
    """
    return world.size > 1 and world.device.type != "cpu"


def compile_blocks(model: GPT2) -> None:
    """Compile each block separately. Compile the output layer and the loss together.

    Hooks on the blocks and the output layer run outside the compiled graphs.
    """
    import torch._dynamo  # slow, and a run that is not compiled does not need it

    # Otherwise, DDP would split every block that is larger than a bucket. The setting applies to the whole process.
    torch._dynamo.config.optimize_ddp = False
    for module in (*model.h, model.lm_head):
        module.forward = torch.compile(module.forward, dynamic=False)

"""Whether a run compiles its model: where it pays, and where a compiler works."""

from __future__ import annotations

from pipeline.config.schema import Config
from pipeline.distributed.device import compiler_works
from pipeline.distributed.world import World

#: On a CPU, Inductor takes one to three minutes for forward, backward and validation, and saves a third of a step.
SHORTEST_CPU_RUN_S = 600.0


def choose_compilation(config: Config, world: World, ideal_s: float) -> Config:
    """The config with ``run.compile`` decided, the same on every rank. Collective.

    Args:
        ideal_s: how long the whole run would take at the ceiling of matrix products.
    """
    wanted = config.run.compile
    if wanted == "auto":
        wanted = world.device.type == "cuda" or (world.device.type == "cpu" and ideal_s > SHORTEST_CPU_RUN_S)
    if wanted:
        wanted = all(world.gather(compiler_works(world.device)))
    return config.model_copy(update={"run": config.run.model_copy(update={"compile": wanted})})

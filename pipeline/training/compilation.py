"""The choice whether a run compiles its model."""

from __future__ import annotations

from pipeline.config.schema import Config
from pipeline.distributed.device import compiler_works
from pipeline.distributed.world import World

#: On a CPU, Inductor takes one to three minutes to compile training and validation, and saves a third of each step.
SHORTEST_CPU_RUN_S = 600.0


def choose_compilation(config: Config, world: World, ideal_s: float) -> Config:
    """Return the config with ``run.compile`` true or false, the same on every rank. Collective.

    Args:
        ideal_s: duration of the whole run at the device's matrix-product throughput.
    """
    wanted = config.run.compile
    if wanted == "auto":
        wanted = world.device.type == "cuda" or (world.device.type == "cpu" and ideal_s > SHORTEST_CPU_RUN_S)
    if wanted:
        wanted = all(world.gather(compiler_works(world.device)))
    return config.model_copy(update={"run": config.run.model_copy(update={"compile": wanted})})

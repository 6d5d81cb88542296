"""One file a backend, behind the one interface of :mod:`pipeline.backends.base`."""

from __future__ import annotations

from pipeline.backends.base import Backend, Fragment, StepResult
from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan
from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2

__all__ = ["Backend", "Fragment", "StepResult", "cpu_adam_problem", "create_backend"]


def create_backend(model: GPT2, config: Config, world: World, plan: BatchPlan) -> Backend:
    """Wrap a freshly built fp32 model in the backend that the config names.

    The backend's module is imported here and not above: DeepSpeed takes seconds to import, and a
    run under DDP should not need it installed.
    """
    if config.backend.name == "ddp":
        from pipeline.backends.ddp import DdpBackend

        return DdpBackend(model, config, world)
    if config.backend.name == "fsdp":
        from pipeline.backends.fsdp import FsdpBackend

        return FsdpBackend(model, config, world)
    from pipeline.backends.deepspeed_zero import DeepSpeedBackend

    return DeepSpeedBackend(model, config, world, plan)


def cpu_adam_problem() -> str | None:
    """Why DeepSpeed's AdamW for offloaded state cannot be built here; None: it can, and now is."""
    from pipeline.backends.deepspeed_zero import cpu_adam_problem

    return cpu_adam_problem()

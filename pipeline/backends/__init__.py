"""Create backends. A backend trains a model on several ranks."""

from pipeline.backends.base import Backend
from pipeline.backends.local_state import Fragment
from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.model.gpt2 import GPT2

__all__ = ["Backend", "Fragment", "cpu_adam_problem", "create_backend"]


def create_backend(model: GPT2, config: Config, world: World, plan: BatchPlan) -> Backend:
    """Return the backend that the config selects. It allocates the weights, but does not set their values.

    Args:
        model: a model on the device ``meta``.
    """
    if config.run.loss_in_blocks != "auto":
        model.lm_head.loss_in_blocks = config.run.loss_in_blocks
    # Only the selected backend is imported, because importing DeepSpeed takes seconds.
    if config.backend.name == "ddp":
        from pipeline.backends.ddp import DdpBackend

        return DdpBackend(model, config, world)
    if config.backend.name == "fsdp":
        from pipeline.backends.fsdp import FsdpBackend

        return FsdpBackend(model, config, world)
    try:
        from pipeline.backends.deepspeed_zero import create_deepspeed_backend
    except ImportError as error:
        raise ConfigError(
            f"backend.name: deepspeed cannot be imported ({error}); install it with pip install deepspeed, or use ddp "
            "or fsdp"
        ) from None

    return create_deepspeed_backend(model, config, world, plan)


def cpu_adam_problem() -> str | None:
    """Build DeepSpeed's CPUAdam if it is not built yet. Return the error message if this fails, otherwise None."""
    from pipeline.backends.deepspeed_zero import cpu_adam_problem

    return cpu_adam_problem()

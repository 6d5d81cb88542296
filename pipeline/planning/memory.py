"""The peak of one rank: the worst moment of a step, and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan
from pipeline.planning.activations import Moment, Request, trace_activations
from pipeline.planning.layouts import layout_of, sizes_of


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by purpose."""

    parameters: int
    masters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


def peak_memory(config: Config, plan: BatchPlan) -> Memory:
    """What a rank holds on its device at the worst moment of a later step, when moments and buckets exist."""
    layout = layout_of(config, plan)
    request = Request(config.model, layout.compute, config.run.precision, plan.micro_batch_size, plan.seq_len)
    finished = Moment(sizes_of(config.model).total, 0, 0)  # all gradients are there, the update has not begun

    def at(moment: Moment) -> Memory:
        return Memory(
            layout.parameters,
            layout.masters,
            layout.optimizer,
            layout.gradients(moment.finished_elements),
            moment.activation_bytes,
            moment.logit_bytes,
            layout.buffers(moment.finished_elements),
        )

    return max(map(at, (*trace_activations(request), finished)), key=lambda memory: memory.total)


def host_memory(config: Config, plan: BatchPlan) -> int:
    """Bytes of a rank in the host's memory: what is offloaded."""
    return layout_of(config, plan).host

"""Plans as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config.schema import Config
from pipeline.distributed.device import GIB
from pipeline.model.gpt2 import parameter_count
from pipeline.planning.devices import Device
from pipeline.planning.planner import Plan

_COLUMNS = ("params", "masters", "optim", "grads", "activ", "logits", "buffers", "total", "host")


def format_plans(config: Config, device: Device, plans: Sequence[Plan], *, mfu: float, tokens: int) -> str:
    """A table of all backends, with what it assumes above it."""
    return "\n".join(_lines(config, device, plans, mfu, tokens))


def _lines(config: Config, device: Device, plans: Sequence[Plan], mfu: float, tokens: int) -> Iterator[str]:
    flops = device.flops(config.run.precision)
    yield f"model    {config.model.preset}, {parameter_count(config.model):,} parameters, {config.run.precision}"
    yield f"batch    {plans[0].batch}"
    yield (
        f"device   {device.name}: {device.usable_bytes / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB for tensors, "
        f"{flops / 1e12:,.3g} TFLOP/s x assumed MFU {mfu:.2f}"
    )
    yield f"budget   {tokens:,} tokens"
    if config.run.compile:
        yield "note     run.compile keeps less than this: memory is that of the uncompiled model"
    yield ""
    yield "GiB a rank at the peak:"
    yield f"{'backend':15}" + "".join(f"{column:>9}" for column in _COLUMNS) + "   fits   largest micro-batch"
    for plan in plans:
        sizes = [*vars(plan.memory).values(), plan.memory.total, plan.host_bytes]
        cells = "".join(f"{size / GIB:9.2f}" for size in sizes)
        yield f"{plan.backend:15}{cells}   {'yes' if plan.fits else 'NO':4}   {plan.largest_micro_batch or '-':>6}"
    yield ""
    yield f"{'backend':15}{'sent a step':>14}{'compute':>12}{'waiting':>12}{'tokens/s':>14}{'days':>10}"
    for plan in plans:
        speed = plan.speed
        days = "-" if plan.days is None else f"{plan.days:,.2f}"
        yield (
            f"{plan.backend:15}{speed.sent_bytes / GIB:10.2f} GiB{speed.compute_s:10.3f} s"
            f"{speed.exposed_communication_s:10.3f} s{speed.tokens_per_s:14,.0f}{days:>10}"
        )

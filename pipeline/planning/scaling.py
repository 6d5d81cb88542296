"""Plan a run for 1 to 4,096 ranks, and show the result as a text chart."""

from collections.abc import Iterator, Mapping, Sequence

from pipeline.config.schema import Config
from pipeline.hardware.device import GIB
from pipeline.planning.devices import Device
from pipeline.planning.planner import Plan, plan_run
from pipeline.planning.presentation import WORLD_SIZES, fastest_plan, format_days
from pipeline.planning.shard_groups import with_shard_groups

BAR_WIDTH = 30


def plan_scaling(configs: Mapping[str, Config], device: Device, *, mfu: float, tokens: int) -> list[Plan]:
    """Return the fastest plan for each number of ranks in ``WORLD_SIZES``.

    - If no plan fits in memory for a number of ranks, return the plan that needs the least memory.
    - If the ranks cannot divide the config's batch equally, the plan has a larger batch.
    - If the config's micro-batch does not fit in memory, or does not divide the batch, the plan has a smaller
      micro-batch.

    Args:
        configs: backend name -> config. The configs differ only in the backend.
        mfu: the fraction of the device's FLOP/s that the computation reaches without communication.
        tokens: the number of training tokens in the whole run.
    """
    plans = []
    for world_size in WORLD_SIZES:
        candidates = {**configs, **with_shard_groups(configs.get("fsdp"), world_size, device.per_node)}
        planned = [
            plan_run(name, config, world_size, device, mfu=mfu, tokens=tokens, grow_batch=True)
            for name, config in candidates.items()
            if world_size % config.backend.ranks_per_copy(world_size) == 0
            and world_size % config.backend.hpz_group_size == 0
        ]
        if planned:
            plans.append(fastest_plan(planned) or min(planned, key=lambda plan: plan.least_bytes))
    return plans


def format_scaling(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield the lines of a text chart. Each row shows the plan for one number of ranks."""
    yield "predicted for other numbers of ranks (a step grows if the ranks cannot divide its sequences equally):"
    heading = f"{'ranks':>5}  {'fastest':14}{'micro-batch':>11}{'tokens per step':>17}{'tokens/s':>16}"
    yield f"{heading}{'time':>13}  efficiency"
    for plan in plans:
        if plan.days is None:
            least = f"{plan.backend} needs the least, {plan.least_bytes / GIB:.2f} GiB for one sequence"
            yield f"{plan.batch.world_size:5}  does not fit: {least}"
            continue
        speed = plan.speed
        bar = "#" * round(BAR_WIDTH * speed.efficiency)
        yield (
            f"{plan.batch.world_size:5}  {plan.backend:14}{plan.micro_batch_size:11}{plan.batch.tokens_per_step:17,}"
            f"{speed.tokens_per_s:16,.0f}"
            f"{format_days(plan.days):>13}  {speed.efficiency:4.0%} {bar}"
        )

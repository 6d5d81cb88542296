"""Print the table of the recipes in docs/planning.md. The plan needs neither a GPU nor data.

python -m benchmarks.recipe_table
"""

from __future__ import annotations

from collections.abc import Iterator

from launch.plan import BACKENDS, with_backend
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.hardware.device import GIB
from pipeline.planning.devices import DEVICES, Device
from pipeline.planning.planner import Plan, plan_run
from pipeline.planning.presentation import fastest_plan, format_days

RECIPES = ("gpt2_124m", "gpt2_124m_muon", "gpt2_350m", "gpt2_774m", "gpt2_1558m")
WORLD_SIZES = (1, 8, 16)
COLUMNS = {"24 GB": "rtx4090", "40 GB": "a100-40gb", "80 GB": "a100-80gb"}


def rows_of(recipe: str) -> Iterator[str]:
    """Yield one row per world size, with the fastest backend on each device."""
    config = load_config([recipe])
    for world_size in WORLD_SIZES:
        cells = (describe_fastest(config, world_size, DEVICES[name]) for name in COLUMNS.values())
        yield f"| `{recipe}` | {world_size} | {' | '.join(cells)} |"


def describe_fastest(config: Config, world_size: int, device: Device) -> str:
    """Return what ``launch/plan.py`` recommends for a config, or the reason why nothing fits."""
    best = fastest_plan([_plan(config, backend, world_size, device) for backend in BACKENDS])
    if best is None:
        return "does not fit"
    assert best.days is not None
    batch = config.batch.model_copy(update={"micro_batch_size": best.micro_batch_size})
    used = _plan(config.model_copy(update={"batch": batch}), best.backend, world_size, device)
    size = f"{used.memory.total / GIB:.1f} GiB"
    return f"{best.backend}, micro-batch {best.micro_batch_size}: {size}, {format_days(best.days)}"


def _plan(config: Config, backend: str, world_size: int, device: Device) -> Plan:
    tokens = config.schedule.max_steps * config.batch.tokens_per_step
    return plan_run(backend, with_backend(config, backend), world_size, device, mfu=device.mfu, tokens=tokens)


def main() -> None:
    print(f"| recipe | GPUs | {' | '.join(f'{memory} ({device})' for memory, device in COLUMNS.items())} |")
    print(f"|---|---|{'---|' * len(COLUMNS)}")
    for recipe in RECIPES:
        for row in rows_of(recipe):
            print(row, flush=True)


if __name__ == "__main__":
    main()

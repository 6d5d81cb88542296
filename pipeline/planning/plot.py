"""Memory and speed against world size, as a picture. Needs the extra ``plots``."""

from __future__ import annotations

from pathlib import Path

from pipeline.distributed.device import GIB
from pipeline.errors import ConfigError
from pipeline.planning.devices import Device
from pipeline.planning.planner import Plan


def draw_world_sizes(path: Path, title: str, plans: dict[str, list[Plan]], device: Device) -> None:
    """Two panels over the number of ranks: GiB a rank, with the device's limit; tokens/s of all ranks, where it fits.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install -c constraints.txt -e '.[plots]'") from None
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    memory, speed = figure.subplots(1, 2)
    for name, of_backend in plans.items():
        ranks = [plan.batch.world_size for plan in of_backend]
        memory.plot(ranks, [plan.memory.total / GIB for plan in of_backend], marker=".", label=name)
        fitting = [plan for plan in of_backend if plan.fits]
        speed.plot(
            [plan.batch.world_size for plan in fitting],
            [plan.speed.tokens_per_s for plan in fitting],
            marker=".",
            label=name,
        )
    memory.axhline(device.usable_bytes / GIB, color="black", linestyle="--", label=f"{device.name}, usable")
    memory.set(xscale="log", yscale="log", xlabel="ranks", ylabel="GiB a rank at the peak")
    speed.set(xscale="log", yscale="log", xlabel="ranks", ylabel="tokens/s of all ranks, where it fits")
    for axes in (memory, speed):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)

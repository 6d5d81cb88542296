"""Show plans in tables and in a plot against the world size."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_tools.errors import install_command
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.hardware.device import GIB
from pipeline.model.gpt2 import parameter_count
from pipeline.planning.devices import Device
from pipeline.planning.planner import Plan, plan_run

_COLUMNS = ("params", "masters", "optim", "grads", "activ", "logits", "buffers", "total", "host")
TIE = 1.01
WORLD_SIZES = [1 << power for power in range(13)]


def format_plans(
    config: Config,
    device: Device,
    plans: Sequence[Plan],
    *,
    mfu: float,
    tokens: int,
    price: float | None = None,
    tables: Iterable[str] | None = None,
) -> str:
    """Return a text about plans: the verdict, the assumptions, the speed of the fastest plan, and two tables.

    Args:
        config: the planned config. The plans may have other backends than this config.
        mfu: the fraction of the device's FLOP/s that the computation reaches without communication.
        tokens: the number of training tokens in the whole run.
        price: the price per hour and device. If given, the text contains the cost.
        tables: lines that replace the two tables.
    """
    flops = device.flops(config.run.precision)
    lines = [
        f"verdict  {format_verdict(plans)}",
        f"model    {config.model}, {parameter_count(config.model):,} parameters, {config.run.precision}",
        f"batch    {plans[0].batch}",
        f"device   {device.name}: {device.usable_bytes / GIB:.1f} of {device.memory_gib:.1f} GiB for tensors, "
        f"{flops / 1e12:,.3g} TFLOP/s x assumed MFU {mfu:.2f}",
        f"network  {_describe_links(device, plans[0].batch.world_size)}",
        f"budget   {tokens:,} tokens",
    ]
    if best := fastest_plan(plans):
        lines += _speed_lines(best, price)
    if config.run.compile:
        lines.append("note     memory is that of the uncompiled model; run.compile needs less")
    return "\n".join([*lines, "", *(tables or [*_memory_table(plans), "", *_speed_table(plans)])])


def _describe_links(device: Device, world_size: int) -> str:
    hosts = -(-world_size // device.per_node)
    on_host = min(world_size, device.per_node)
    within = f"{on_host} per host"
    if on_host > 1:
        within += f", {8 * device.node_gb_per_s:,.4g} Gbit/s between two {'GPUs' if device.is_gpu else 'ranks'}"
    if hosts == 1:
        return f"1 host, {within}"
    return f"{hosts} hosts, {within}; {8 * device.network_gb_per_s * device.per_node:,.4g} Gbit/s between hosts"


def _speed_lines(plan: Plan, price: float | None) -> Iterator[str]:
    speed, waits = plan.speed, plan.speed.waits
    step_s = speed.compute_s + waits.total_s
    yield f"speed    predicted: {speed.tokens_per_s:,.0f} tokens/s, a step of {1e3 * step_s:,.1f} ms"
    causes = {
        "bandwidth between hosts": waits.between_hosts_s,
        "bandwidth within a host": waits.within_host_s,
        "latency": waits.latency_s,
        "offload": waits.offload_s,
    }
    shares = [f"{cause} {seconds / step_s:.1%}" for cause, seconds in causes.items() if seconds > 0]
    yield f"limit    predicted: efficiency {speed.efficiency:.1%}; waits for {', '.join(shares) or 'nothing'}"
    if price is not None:
        yield f"cost     predicted: {plan.gpu_hours:,.0f} GPU-hours x {price:g} = {price * plan.gpu_hours:,.0f}"


def fastest_plan(plans: Sequence[Plan]) -> Plan | None:
    """Return the plan that needs the fewest days, or None if no plan fits.

    If several plans are within 1% of the fewest days, return the first of them, because plans are not accurate to 1%.
    """
    fitting = [(plan, plan.days) for plan in plans if plan.days is not None]
    fewest = min((days for _, days in fitting), default=0.0)
    return next((plan for plan, days in fitting if days <= TIE * fewest), None)


def format_verdict(plans: Sequence[Plan]) -> str:
    """Return one line that says whether any plan fits in memory.

    If a plan fits, the line describes the fastest plan. Otherwise, it describes the plan that needs the least memory.
    """
    if plan := fastest_plan(plans):
        assert plan.days is not None
        return f"fits: {plan.backend}, micro-batch {plan.micro_batch_size}, {format_days(plan.days)}"
    least = min(plans, key=lambda plan: plan.least_bytes)
    return (
        f"does not fit: {least.backend} needs the least, {least.least_bytes / GIB:.2f} GiB for one sequence, and "
        f"{least.usable_bytes / GIB:.2f} GiB are usable; use more ranks, "
        "model.activation_checkpointing=true or a shorter data.seq_len"
    )


def format_days(days: float) -> str:
    """Return a duration as text, in the largest unit of which it has at least one."""
    if days >= 1:
        return f"{days:,.1f} days"
    units = {"hours": 24 * days, "minutes": 1440 * days, "seconds": 86400 * days}
    unit = next((unit for unit, count in units.items() if count >= 1), "seconds")
    return f"{units[unit]:.2g} {unit}"


def _memory_table(plans: Sequence[Plan]) -> Iterator[str]:
    yield f"GiB per rank at the peak, with micro-batch {plans[0].batch.micro_batch_size} of the config:"
    yield f"{'backend':15}" + "".join(f"{column:>9}" for column in _COLUMNS) + "   fits   largest micro-batch"
    for plan in plans:
        sizes = [*vars(plan.memory).values(), plan.memory.total, plan.host_bytes]
        cells = "".join(f"{size / GIB:9.2f}" for size in sizes)
        yield f"{plan.backend:15}{cells}   {'yes' if plan.fits else 'NO':4}   {plan.largest_micro_batch or '-':>6}"


def _speed_table(plans: Sequence[Plan]) -> Iterator[str]:
    yield f"{'backend':15}{'micro-batch':>12}{'sent per step':>16}{'compute':>12}" + (
        f"{'waiting':>12}{'tokens/s':>14}{'days':>10}"
    )
    for plan in plans:
        speed = plan.speed
        days = "-" if plan.days is None else f"{plan.days:,.2f}"
        yield (
            f"{plan.backend:15}{plan.micro_batch_size:12}{speed.sent_bytes / GIB:12.2f} GiB{speed.compute_s:10.3f} s"
            f"{speed.waits.total_s:10.3f} s{speed.tokens_per_s:14,.0f}{days:>10}"
        )


def draw_world_sizes(path: Path, configs: dict[str, Config], device: Device, *, mfu: float, tokens: int) -> None:
    """Plan each config for 1 to 4096 ranks. Draw the memory per rank, the tokens/s and the efficiency.

    Args:
        path: the image file to write. Its suffix selects the format.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"--plot needs matplotlib: {install_command('plots')}") from None
    figure = Figure(figsize=(16, 5), layout="constrained")
    FigureCanvasAgg(figure)
    memory, speed, efficiency = figure.subplots(1, 3)
    for name, config in configs.items():
        world_sizes = [n for n in WORLD_SIZES if n % config.backend.ranks_per_copy(n) == 0]
        plans = [plan_run(name, config, n, device, mfu=mfu, tokens=tokens, grow_batch=True) for n in world_sizes]
        memory.plot(world_sizes, [plan.memory.total / GIB for plan in plans], marker=".", label=name)
        tokens_per_s = [plan.speed.tokens_per_s if plan.days is not None else math.nan for plan in plans]
        speed.plot(world_sizes, tokens_per_s, marker=".", label=name)
        computing = [plan.speed.efficiency if plan.days is not None else math.nan for plan in plans]
        efficiency.plot(world_sizes, computing, marker=".", label=name)
    memory.axhline(device.usable_bytes / GIB, color="black", linestyle="--", label=f"{device.name}, usable")
    memory.set(yscale="log", xlabel="ranks", ylabel="GiB per rank at the peak")
    speed.set(yscale="log", xlabel="ranks", ylabel="predicted tokens/s of all ranks, where it fits")
    efficiency.set(ylim=(0, 1), xlabel="ranks", ylabel="predicted fraction of a step that computes, where it fits")
    for axes in (memory, speed, efficiency):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    size = f"micro-batch up to {config.batch.micro_batch_size}"
    figure.suptitle(f"{config.model}, {config.run.precision}, {size}, {device.name}")
    figure.savefig(path, dpi=120)

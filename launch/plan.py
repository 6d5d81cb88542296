"""Estimate the memory, communication and time of a run before you buy GPUs. You need neither a GPU nor data."""

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli import (
    ArgumentParser,
    add_config_options,
    bandwidth,
    positive_int,
    positive_number,
    probability,
    run_command,
    token_count,
)
from data_tools.storage.files import is_writable
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.config.shipped import shipped_configs
from pipeline.data.batch_plan import largest_divisor
from pipeline.errors import ConfigError
from pipeline.planning.shard_groups import GROUP_MARK, with_shard_groups

if TYPE_CHECKING:
    from pipeline.planning.planner import Plan

BACKENDS = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
PICTURES = (".png", ".svg", ".pdf")


def main() -> None:
    arguments = build_parser().parse_args()
    config = load_config(arguments.config, arguments.set, arguments.deepspeed)
    if arguments.tokens:
        arguments.set = _overrides_for_tokens(arguments, config)
        config = load_config(arguments.config, arguments.set, arguments.deepspeed)
    if arguments.schedule:
        from pipeline.training.schedule import format_schedule

        print(format_schedule(config))
        return
    from pipeline.planning.devices import find_device
    from pipeline.planning.planner import plan_run
    from pipeline.planning.presentation import draw_world_sizes, fastest_plan, format_plans, format_verdict
    from pipeline.planning.scaling import format_scaling, plan_scaling

    device = find_device(
        arguments.device,
        config.run.precision,
        arguments.world_size,
        memory_gib=arguments.memory,
        tflops=arguments.tflops,
        per_node=arguments.gpus_per_host,
        network_gbit_per_s=arguments.network,
    )
    mfu = arguments.mfu or device.mfu
    tokens = arguments.tokens or config.schedule.max_steps * config.batch.tokens_per_step
    divided = divide_equally(config, arguments.world_size)
    configs = {name: with_backend(divided, name) for name in arguments.backends}
    configs |= with_shard_groups(configs.get("fsdp"), arguments.world_size, device.per_node)
    plans = [
        plan_run(name, of_backend, arguments.world_size, device, mfu=mfu, tokens=tokens)
        for name, of_backend in configs.items()
    ]
    undivided = {name: with_backend(config, name) for name in arguments.backends}  # for other numbers of ranks
    if arguments.plot:
        draw_world_sizes(arguments.plot, undivided, device, mfu=mfu, tokens=tokens)
    scaling = plan_scaling(undivided, device, mfu=mfu, tokens=tokens) if arguments.scaling else None
    verdict, best, price = format_verdict(plans), fastest_plan(plans), arguments.price_per_gpu_hour
    command = _train_command(arguments, config, best, configs[best.backend], device.per_node) if best else None
    if arguments.json:
        cost = price * best.gpu_hours if price and best else None
        summary = {"fits": best is not None, "text": verdict, "command": command, "cost": cost}
        print(_format_json(summary, plans, scaling))
        return
    tables = None if scaling is None else format_scaling(scaling)
    print(format_plans(divided, device, plans, mfu=mfu, tokens=tokens, price=price, tables=tables), end="\n\n")
    if divided is not config:
        print(_describe_division(config, divided, arguments.world_size))
    print(f"{verdict}: {command}" if command else verdict)


def _format_json(verdict: dict[str, Any], plans: Sequence["Plan"], scaling: Sequence["Plan"] | None) -> str:
    output: dict[str, Any] = {"verdict": verdict, "plans": [plan.to_json() for plan in plans]}
    if scaling is not None:
        output["scaling"] = [plan.to_json() for plan in scaling]
    return json.dumps(output, indent=2)


def _describe_division(config: Config, divided: Config, world_size: int) -> str:
    sequences = config.batch.tokens_per_step // config.seq_len // world_size
    return (
        f"note: batch.micro_batch_size {config.batch.micro_batch_size} does not divide the {sequences} "
        f"sequences of a rank per step; the plan starts from {divided.batch.micro_batch_size}"
    )


def _overrides_for_tokens(arguments: argparse.Namespace, config: Config) -> list[str]:
    """Return the values of ``--set``, with a schedule of ``--tokens`` tokens. A long warm-up becomes shorter."""
    max_steps = math.ceil(arguments.tokens / config.batch.tokens_per_step)
    overrides = [*arguments.set, f"schedule.max_steps={max_steps}"]
    if config.schedule.warmup_steps > max_steps:
        overrides.append(f"schedule.warmup_steps={max_steps // 10}")
    return overrides


def _train_command(arguments: argparse.Namespace, config: Config, best: "Plan", chosen: Config, per_node: int) -> str:
    """Return the command that trains with the plan ``best``. ``chosen`` is the config with this plan's backend."""
    options = _train_options(arguments, config, best.backend, chosen, best.micro_batch_size)
    return shlex.join([*_launcher(arguments.world_size, per_node), "-m", "launch.train", *options])


def _launcher(world_size: int, per_node: int) -> list[str]:
    """Return the command that starts ``world_size`` processes, without the module and its options."""
    if world_size == 1:
        return ["python"]
    if world_size <= per_node:
        return ["torchrun", "--standalone", f"--nproc_per_node={world_size}"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-id=run1", "--rdzv-endpoint=node0:29500"]
    return ["torchrun", f"--nnodes={world_size // per_node}", f"--nproc_per_node={per_node}", *rendezvous]


def _train_options(
    arguments: argparse.Namespace, config: Config, name: str, chosen: Config, micro_batch_size: int
) -> list[str]:
    overrides = list(arguments.set)
    name, _, group = name.partition(GROUP_MARK)
    if group:
        overrides.append(f"backend.fsdp.shard_group_size={group}")
    if micro_batch_size != config.batch.micro_batch_size:
        overrides.append(f"batch.micro_batch_size={micro_batch_size}")
    own = list(map(str, arguments.config))
    candidates = [(own, arguments.deepspeed), ([name, *own], None)]
    candidates.append(([name if Path(file).stem in BACKENDS else file for file in own], None))
    for files, deepspeed in candidates:
        with suppress(ConfigError):
            if load_config(files, overrides, deepspeed).backend == chosen.backend:
                given = ["--deepspeed", str(deepspeed)] if deepspeed else []
                return ["--config", *files, *given, *(["--set", *overrides] if overrides else [])]
    # The user's files set another backend, so the file of this backend must come last.
    return ["--config", *own, name, *(["--set", *overrides] if overrides else [])]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        example="gpt2-pipeline plan --config gpt2_774m --world-size 8 --device h100-80gb",
    )
    add_config_options(parser)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--world-size", "--gpus", type=positive_int, metavar="N", help="ranks, one per device")
    wanted.add_argument(
        "--schedule", action="store_true", help="show the learning rate over the steps of the run instead of a plan"
    )
    _add_device_options(parser)
    parser.add_argument(
        "--price-per-gpu-hour", type=positive_number, metavar="PRICE", help="also show the cost of the run"
    )
    parser.add_argument(
        "--backends", nargs="+", default=BACKENDS, choices=BACKENDS, help="backends to plan (default: all)"
    )
    parser.add_argument(
        "--tokens",
        type=token_count,
        metavar="N",
        help="token budget, such as 10B or 10e9 (default: all steps of the config's schedule)",
    )
    parser.add_argument(
        "--plot", type=_picture_path, metavar="FILE", help="also draw a plot of 1 to 4096 ranks; needs the extra plots"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="show a chart of the efficiency on 1 to 4096 ranks instead of the tables"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_device_options(parser: ArgumentParser) -> None:
    """Add the options that describe the devices and their network."""
    parser.add_argument(
        "--device",
        default="h100-80gb",
        metavar="NAME",
        help="h100-80gb, h200, a100-80gb, a100-40gb, rtx4090, l4, or this, which measures this machine "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--gpus-per-host",
        type=positive_int,
        metavar="N",
        help="devices per host (default: 8, or all of this machine)",
    )
    parser.add_argument(
        "--network",
        type=bandwidth,
        metavar="SPEED",
        help="network bandwidth of a host, such as 400gbit, or 8x400gbit for eight adapters (default: the usual one "
        "for the device)",
    )
    parser.add_argument(
        "--memory", type=positive_number, metavar="GIB", help="a device's memory, such as 24 (default: its own)"
    )
    parser.add_argument(
        "--tflops",
        type=positive_number,
        metavar="N",
        help="dense TFLOP/s of a device in run.precision (default: the device's own)",
    )
    parser.add_argument(
        "--mfu",
        type=probability,
        metavar="FRACTION",
        help="assumed fraction of the device's FLOP/s, from 0 to 1 (default: the device's own)",
    )


def _picture_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PICTURES or not path.parent.is_dir() or not is_writable(path):
        raise argparse.ArgumentTypeError(f"must be a {', '.join(PICTURES)} file in a writable folder, it is {text!r}")
    return path


def divide_equally(config: Config, world_size: int) -> Config:
    """Return the config with a micro-batch size that divides the number of sequences per rank and step.

    The new size is at most the size in the config, and as large as possible. If the ranks cannot divide the batch
    equally, the config is returned unchanged.
    """
    sequences, rest = divmod(config.batch.tokens_per_step, config.seq_len * world_size)
    size = config.batch.micro_batch_size
    if rest or not sequences or sequences % size == 0:
        return config
    fitting = largest_divisor(sequences, size)
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_batch_size": fitting})})


def with_backend(config: Config, name: str) -> Config:
    """Return ``config`` with the backend of the shipped config ``name``, such as ``zero2_offload``.

    If ``config`` already uses this kind of backend, the result is ``config``. Two DeepSpeed backends are of the same
    kind if they have the same ZeRO stage and the same offload.
    """
    backend = load_config([shipped_configs()[name]]).backend
    if config.backend.name == "deepspeed" and backend.name == "deepspeed":
        own, other = (config.backend.zero, backend.zero)
        same_kind = all(own.get(key) == other.get(key) for key in ("stage", "offload_optimizer", "offload_param"))
    else:
        same_kind = config.backend.name == backend.name
    if same_kind:
        return config
    changed = config.backend.model_copy(update={"name": backend.name, "deepspeed": backend.deepspeed})
    return config.model_copy(update={"backend": changed})


if __name__ == "__main__":
    run_command(main)

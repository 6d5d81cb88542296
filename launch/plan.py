"""Estimate the memory, communication and time of a run before you buy GPUs. You need neither a GPU nor data."""

import argparse
import json
import os
import shlex
from contextlib import suppress
from pathlib import Path

from data_tools.storage.files import is_writable
from launch.cli import (
    ArgumentParser,
    add_config_options,
    positive_int,
    positive_number,
    probability,
    run_command,
    token_count,
)
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.config.shipped import shipped_configs
from pipeline.errors import ConfigError

BACKENDS = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
_GROUP_MARK = "/"  # in the name of a plan, between the backend and the size of the shard groups
PICTURES = (".png", ".svg", ".pdf")


def main() -> None:
    """Parse the arguments, plan the run with every backend, and print the plans."""
    arguments = build_parser().parse_args()
    config = load_config(arguments.config, arguments.set, arguments.deepspeed)
    if arguments.schedule:
        from pipeline.training.schedule import format_schedule

        print(format_schedule(config))
        return
    configs = {name: with_backend(config, name) for name in arguments.backends}
    from pipeline.planning.devices import find_device
    from pipeline.planning.planner import plan_run
    from pipeline.planning.presentation import draw_world_sizes, fastest_plan, format_plans, format_verdict

    device = find_device(
        arguments.device,
        config.run.precision,
        arguments.world_size,
        memory_gib=arguments.memory,
        tflops=arguments.tflops,
    )
    mfu = arguments.mfu or device.mfu
    tokens = arguments.tokens or config.schedule.max_steps * config.batch.tokens_per_step
    hybrids = with_shard_groups(configs.get("fsdp"), arguments.world_size, device.per_node)
    plans = [
        plan_run(name, of_backend, arguments.world_size, device, mfu=mfu, tokens=tokens)
        for name, of_backend in (configs | hybrids).items()
    ]
    if arguments.plot:
        draw_world_sizes(arguments.plot, configs, device, mfu=mfu, tokens=tokens)
    verdict, command = format_verdict(plans), None
    if best := fastest_plan(plans):
        launcher = _launcher(arguments.world_size, device.per_node)
        chosen = (configs | hybrids)[best.backend]
        options = _train_options(arguments, config, best.backend, chosen, best.micro_batch_size)
        command = shlex.join([*launcher, "launch/train.py", *options])
    if arguments.json:
        of_verdict = {"fits": best is not None, "text": verdict, "command": command}
        print(json.dumps({"verdict": of_verdict, "plans": [plan.to_json() for plan in plans]}, indent=2))
    else:
        print(format_plans(config, device, plans, mfu=mfu, tokens=tokens), end="\n\n")
        print(f"{verdict}: {command}" if command else verdict)


def _launcher(world_size: int, per_node: int) -> list[str]:
    """Return the command that starts ``world_size`` processes, except the script and its options."""
    if world_size == 1:
        return ["python"]
    nodes, rest = divmod(world_size, per_node)
    if nodes <= 1 or rest:
        return ["torchrun", "--standalone", f"--nproc_per_node={world_size}"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-id=run1", "--rdzv-endpoint=node0:29500"]
    return ["torchrun", f"--nnodes={nodes}", f"--nproc_per_node={per_node}", *rendezvous]


def _train_options(
    arguments: argparse.Namespace, config: Config, name: str, chosen: Config, micro_batch_size: int
) -> list[str]:
    """Return the options of ``launch/train.py`` for the planned backend and micro-batch."""
    overrides = list(arguments.set)
    name, _, group = name.partition(_GROUP_MARK)
    if group:
        overrides.append(f"backend.fsdp.shard_group_size={group}")
    if micro_batch_size != config.batch.micro_batch_size:
        overrides.append(f"batch.micro_batch_size={micro_batch_size}")
    own = list(map(str, arguments.config))
    backend = os.path.relpath(shipped_configs()[name])
    candidates = [(own, arguments.deepspeed), ([backend, *own], None)]
    candidates.append(([backend if Path(file).stem in BACKENDS else file for file in own], None))
    for files, deepspeed in candidates:
        with suppress(ConfigError):
            if load_config(files, overrides, deepspeed).backend == chosen.backend:
                given = ["--deepspeed", str(deepspeed)] if deepspeed else []
                return ["--config", *files, *given, *(["--set", *overrides] if overrides else [])]
    # The files or overrides set another backend, which the section of this file has to replace.
    return ["--config", *own, backend, *(["--set", *overrides] if overrides else [])]


def build_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(
        description=__doc__,
        example="python launch/plan.py --config ds_configs/gpt2_774m.json --world-size 8 --device h100-80gb",
    )
    add_config_options(parser)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--world-size", type=positive_int, metavar="N", help="ranks, one per device")
    wanted.add_argument(
        "--schedule", action="store_true", help="show the learning rate over the steps of the run instead of a plan"
    )
    parser.add_argument(
        "--device",
        default="h100-80gb",
        metavar="NAME",
        help="h100-80gb, h200, a100-80gb, a100-40gb, rtx4090, l4, or this, which measures this machine "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--backends", nargs="+", default=BACKENDS, choices=BACKENDS, help="backends to plan (default: all)"
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
        "--tokens",
        type=token_count,
        metavar="N",
        help="token budget, such as 10B or 10e9 (default: all steps of the config's schedule)",
    )
    parser.add_argument(
        "--mfu",
        type=probability,
        metavar="FRACTION",
        help="assumed fraction of the device's FLOP/s, from 0 to 1 (default: the device's own)",
    )
    parser.add_argument(
        "--plot", type=_picture_path, metavar="FILE", help="also draw a plot of 1 to 4096 ranks; needs the extra plots"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _picture_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PICTURES or not path.parent.is_dir() or not is_writable(path):
        raise argparse.ArgumentTypeError(f"must be a {', '.join(PICTURES)} file in a writable folder, it is {text!r}")
    return path


def with_backend(config: Config, name: str) -> Config:
    """Return a copy of a config with another backend.

    If the backend is DDP or FSDP2, its settings are those in ``config``. If it is DeepSpeed, its settings come from the
    config file. However, if ``config`` already uses DeepSpeed with the ZeRO stage and the offload of the config file,
    ``config`` is returned unchanged.

    Args:
        name: the name of a config file in ``ds_configs``, which selects the backend.
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


def with_shard_groups(config: Config | None, world_size: int, per_node: int) -> dict[str, Config]:
    """Return copies of the FSDP2 config with larger and larger shard groups.

    A shard group is a set of ranks that together hold one copy of the weights. In the first copy of the config, a shard
    group contains the ranks of one node. In the later copies, it contains the ranks of two, four, eight, ... nodes. If
    the groups for a number of nodes would not have equal sizes, this number is skipped.

    The keys of the result are names for the plans. The result is empty in three cases: ``config`` is None, ``config``
    already sets the size of the shard groups, or the ranks do not exactly fill two or more nodes.

    Args:
        config: a config with the backend FSDP2, or None.
        per_node: the number of ranks per node.
    """
    if config is None or config.backend.fsdp.shard_group_size is not None or world_size % per_node:
        return {}
    configs, size = {}, per_node
    while size < world_size:
        if world_size % size == 0:
            fsdp = config.backend.fsdp.model_copy(update={"shard_group_size": size})
            backend = config.backend.model_copy(update={"fsdp": fsdp})
            configs[f"fsdp{_GROUP_MARK}{size}"] = config.model_copy(update={"backend": backend})
        size *= 2
    return configs


if __name__ == "__main__":
    run_command(main)

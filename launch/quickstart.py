"""Tokenize Python's standard library, train a small GPT-2 on it, evaluate it and generate text, in a few minutes.

The command measures the time of a step on this machine, and then chooses the number of steps. All stages together take
about as long as the option --minutes says. If the command is interrupted, repeat it. Finished stages are skipped,
and an interrupted run continues.
"""

import importlib.util
import math
import shlex
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cli import ArgumentParser, positive_number, run_command, start_logging
from data_tools.errors import PROJECT, install_command
from data_tools.shards.manifest import load_manifest
from launch.run import evaluate, run_stage, sample, tokenize, train
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.distributed.environment import is_activated_environment
from pipeline.run_folder.layout import CONFIG_FILE, REPORT_PAGE
from pipeline.run_folder.metrics import read_metrics

CONFIGS = ("ddp", "quickstart")

#: The numbers of steps to measure the time of a step. The first steps are slower and do not count.
PROBE_STEPS, PROBE_WARM_UP_STEPS = 5, 2

FEWEST_STEPS = 20

#: How often Python starts and loads a model: for the training, and for each later stage.
STARTS_AFTER_PROBE = 5

EVALUATIONS = 4

#: Shorter evaluations during the training, for a command that takes longer than --minutes allows.
SHORT_EVALUATIONS = {"evaluation.max_batches": 4, "evaluation.sample": "false"}

BOX_WIDTH = 80
BAR_WIDTH = 60


def main() -> None:
    started = time.perf_counter()
    arguments = build_parser().parse_args()
    start_logging()
    config = load_config(CONFIGS, arguments.set)
    tokenize(config)
    settings = choose_settings(arguments.set, config, started + 60 * arguments.minutes)
    config = load_config(CONFIGS, settings)
    train(train_options(settings))
    evaluate(config)
    text = sample(config)
    report = write_report(config)
    print(summarize(config, text, time.perf_counter() - started, report), flush=True)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, example="gpt2-pipeline quickstart --minutes 1")
    parser.add_argument(
        "--minutes",
        type=positive_number,
        default=4.0,
        metavar="M",
        help=f"time for all stages together; at least {FEWEST_STEPS} steps are trained (default: %(default)g)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="values that override the shipped configs ddp and quickstart; with schedule.max_steps=N, the command "
        "does not choose the number of steps",
    )
    return parser


def choose_settings(given: Sequence[str], config: Config, deadline: float) -> list[str]:
    """Choose the precision and the number of steps. Return all values for ``--set``.

    Values that the user has set do not change. If the run folder already contains a run, the precision and the number
    of steps of this run are kept.

    Args:
        given: the user's values of ``--set``. The result begins with them.
        deadline: the time of ``time.perf_counter()`` at which the quickstart should end.
    """
    begun = Path(config.run.out_dir) / CONFIG_FILE
    if begun.exists():
        before = load_config([begun])
        print(f"\n{begun.parent} exists: its run keeps its {before.schedule.max_steps} steps", flush=True)
        chosen = {
            "run.precision": before.run.precision,
            "schedule.max_steps": before.schedule.max_steps,
            "evaluation.every_steps": before.evaluation.every_steps,
        }
        return _with_defaults(given, chosen)
    settings = _with_defaults(given, {"run.precision": choose_precision(config.run.device)})
    if any(value.startswith("schedule.max_steps=") for value in given):
        return settings
    step_s, start_s = measure_step(settings)
    left_s = deadline - time.perf_counter() - STARTS_AFTER_PROBE * start_s
    steps = fit_steps(config, step_s, left_s)
    remark = f", longer than --minutes allows: at least {FEWEST_STEPS} steps are trained"
    is_late = steps * step_s > max(left_s, 0)
    print(f"\n{step_s:.2f} s per step: {steps} steps will take {steps * step_s:.0f} s{remark * is_late}", flush=True)
    every_steps = steps if is_late else math.ceil(steps / EVALUATIONS)
    chosen = {"schedule.max_steps": steps, "evaluation.every_steps": every_steps}
    return _with_defaults(settings, chosen | SHORT_EVALUATIONS if is_late else chosen)


def _with_defaults(given: Sequence[str], defaults: Mapping[str, object]) -> list[str]:
    keys = {value.partition("=")[0] for value in given}
    return [*given, *(f"{key}={value}" for key, value in defaults.items() if key not in keys)]


def choose_precision(device: str) -> str:
    """Return the fastest precision on this machine that needs no loss scaling."""
    import torch

    from pipeline.hardware.matmul_ceiling import WORTHWHILE_SPEEDUP, measure_matmul_ceiling

    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return "amp_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        return "fp32"
    cpu = torch.device("cpu")
    bf16, fp32 = (measure_matmul_ceiling(cpu, dtype) for dtype in (torch.bfloat16, torch.float32))
    return "bf16" if bf16 > WORTHWHILE_SPEEDUP * fp32 else "fp32"


def measure_step(settings: Sequence[str]) -> tuple[float, float]:
    """Train a few steps in a temporary run folder.

    Return the seconds per step, and the seconds that the training command spent outside the steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        short = {"run.out_dir": folder, "schedule.max_steps": PROBE_STEPS, "evaluation.sample": "false"}
        short |= {
            "logging.every_steps": 1,
            "logging.sinks": '["jsonl"]',
            "checkpoint.every_steps": PROBE_STEPS,
        }
        others = [value for value in settings if value.partition("=")[0] not in short]
        started = time.perf_counter()
        options = train_options(_with_defaults(others, short))
        run_stage("measure the time of a step", [sys.executable], "train.py", options, returns_output=True)
        command_s = time.perf_counter() - started
        step_s = [row["step_ms"] / 1e3 for row in read_metrics(Path(folder)) if "step_ms" in row]
    return statistics.median(step_s[PROBE_WARM_UP_STEPS:]), command_s - sum(step_s)


def fit_steps(config: Config, step_s: float, left_s: float) -> int:
    """Return how many steps of ``step_s`` seconds fit into the remaining ``left_s`` seconds.

    The result is at most the number of steps of one pass over the data, and at least ``FEWEST_STEPS``.
    """
    assert config.data.path is not None
    one_pass = load_manifest(config.data.path).tokens_of("train") // config.batch.tokens_per_step
    return max(FEWEST_STEPS, int(min(one_pass, left_s / step_s)))


def train_options(settings: Sequence[str]) -> list[str]:
    """Return the options that train the quickstart's model with ``settings`` as values of ``--set``."""
    return ["--config", *CONFIGS, "--set", *settings]


def write_report(config: Config) -> str:
    """Write the HTML report of the run and return its path.

    Without matplotlib, write nothing, and return a text that tells the user how to get the report.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return f"{install_command('plots')}; {command('report', config.run.out_dir)}"
    run_stage("report", [sys.executable], "report.py", [config.run.out_dir])
    return str(Path(config.run.out_dir) / REPORT_PAGE)


def summarize(config: Config, text: str, seconds: float, report: str) -> str:
    """Return the last lines that the command prints: the generated text, the losses, and commands to try next."""
    run_folder = config.run.out_dir
    losses = {row["step"]: row["val_loss"] for row in read_metrics(Path(run_folder)) if row.get("val_loss") is not None}
    tokens = config.schedule.max_steps * config.batch.tokens_per_step
    trained = f"{config.schedule.max_steps} steps, {tokens / 1e6:.2f}M tokens"
    lines = [
        *([("first", activation)] if (activation := activation_command()) else []),
        ("loss curves", report),
        ("complete a text", command("generate", "--checkpoint", run_folder, "--prompt", "import ")),
        ("train longer", command("quickstart", "--minutes", "20", "--set", "run.out_dir=runs/longer")),
        ("two processes", other_backend(config)),
        ("your own text", command("tokenize", "--source", "text", "--input", "FOLDER", "--out", "data/mine")),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(
        [
            "",
            boxed(text.rstrip(), "the model continues " + repr(config.sample.prompt)),
            "",
            *draw_losses(losses),
            "",
            f"{trained}; {seconds / 60:.1f} minutes in total",
            "",
            *(f"{name:<{width}}  {value}" for name, value in lines),
        ]
    )


def other_backend(config: Config) -> str:
    """Return the command that trains the same model with FSDP2 on two processes. Without two GPUs, it uses the CPU."""
    import torch

    settings = [f"data.path={config.data.path}", "run.out_dir=runs/fsdp"]
    if torch.cuda.device_count() < 2:
        settings.append("run.device=cpu")
    launcher = "torchrun --standalone --nproc_per_node=2 -m launch.train --config fsdp quickstart --set"
    return f"{launcher} {shlex.join(settings)}"


def activation_command() -> str | None:
    """Return the command that activates this Python's environment. Return None if the shell needs no such command."""
    script = Path(sys.prefix) / "bin" / "activate"
    if not script.is_file() or is_activated_environment(sys.prefix):
        return None
    is_near = script.is_relative_to(Path.cwd())
    return shlex.join(["source", str(script.relative_to(Path.cwd()) if is_near else script)])


def draw_losses(losses: Mapping[int, float]) -> list[str]:
    """Return one line per evaluation: the step, the validation loss, and a bar of at most BAR_WIDTH characters.

    Above these lines is a line with headings. Returns an empty list if there is no evaluation.
    """
    if not losses:
        return []
    bars = {step: "#" * round(BAR_WIDTH * loss / max(losses.values())) for step, loss in losses.items()}
    return [f"{'step':>6}  validation loss", *(f"{step:>6}  {losses[step]:5.2f}  {bar}" for step, bar in bars.items())]


def boxed(text: str, title: str) -> str:
    """Return a text, with wrapped lines, in a box of BOX_WIDTH characters."""
    inner = BOX_WIDTH - 4
    lines = [
        part
        for line in text.expandtabs(4).splitlines()
        for part in textwrap.wrap(line, inner, replace_whitespace=False, drop_whitespace=False) or [""]
    ]
    edge, corners = ("─", "┌┐└┘") if _prints_lines() else ("-", "++++")
    side = "│" if _prints_lines() else "|"
    top = f"{corners[0]}{edge} {title} ".ljust(BOX_WIDTH - 1, edge) + corners[1]
    bottom = corners[2] + edge * (BOX_WIDTH - 2) + corners[3]
    return "\n".join([top, *(f"{side} {line:<{inner}} {side}" for line in lines), bottom])


def _prints_lines() -> bool:
    try:
        "┌─┐│└┘".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def command(name: str, *arguments: str) -> str:
    """Return a command line of ``gpt2-pipeline`` that the user can type."""
    return shlex.join([PROJECT, name, *arguments])


if __name__ == "__main__":
    run_command(main)

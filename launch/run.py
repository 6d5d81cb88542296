"""Run all stages of one config: tokenize, train, evaluate, generate a completion. Finished stages are skipped."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch.cli import ArgumentParser, add_config_options, config_options, positive_int, run_command
from pipeline.checkpoint.layout import list_checkpoints
from pipeline.config.loading import load_config
from pipeline.config.paths import find_path
from pipeline.config.schema import Config
from pipeline.evaluation.results import find_results, format_table


def main() -> None:
    arguments = build_parser().parse_args()
    config = load_config(arguments.config, arguments.set, arguments.deepspeed)
    tokenize(config)
    train(config_options(arguments), processes=arguments.processes)
    evaluate(config)
    print(sample(config), end="", flush=True)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, example="gpt2-pipeline run --config ddp quickstart")
    add_config_options(parser)
    add_processes_option(parser)
    return parser


def add_processes_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of training processes on this machine (default: 1)",
    )


def tokenize(config: Config) -> None:
    """Tokenize the corpus into the folder ``data.path``. If this folder is already complete, do nothing."""
    if config.data.path is None:
        print("\n== tokenize: nothing to do, data.mixture names finished datasets", flush=True)
        return
    options = _options(config.tokenize.model_dump(exclude={"input"}, exclude_none=True))
    if config.tokenize.input:
        options += ["--input", *config.tokenize.input]
    run_stage("tokenize", [sys.executable], "tokenize_corpus.py", [*options, "--out", config.data.path])


def train(options: Sequence[str], *, processes: int = 1) -> None:
    """Train the model, or resume an interrupted run. If the run is already complete, do nothing.

    Args:
        options: the options of the train command.
        processes: the number of training processes on this machine.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run_stage("train", launcher, "train.py", options)


def evaluate(config: Config) -> None:
    """Run the tasks in ``evaluation.tasks`` on the last checkpoint. If their results already exist, print them."""
    results = find_results(list_checkpoints(Path(config.run.out_dir))[-1], config)
    if results is not None:
        print(f"\n== evaluate: done before\n{format_table(results)}", flush=True)
        return
    tasks = config.evaluation.tasks
    options = ["--checkpoint", config.run.out_dir, "--tasks", *tasks, "--device", config.run.device]
    data = {task: find_path(path, config.run) for task, path in config.evaluation.data.items() if task in tasks}
    if data:
        options += ["--data", *(f"{task}={path}" for task, path in data.items())]
    run_stage("evaluate", [sys.executable], "evaluate.py", options)


def sample(config: Config) -> str:
    """Return a completion by the trained model, with the settings of the config section ``sample``."""
    options = ["--checkpoint", config.run.out_dir, "--seed", str(config.run.seed), "--device", config.run.device]
    options += _options(config.sample.model_dump(exclude={"stop"}, exclude_none=True))
    options += [f"--stop={text}" for text in config.sample.stop]
    return run_stage("sample", [sys.executable], "generate.py", options, returns_output=True)


def _options(settings: dict[str, object]) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


def run_stage(
    stage: str, launcher: Sequence[str], script: str, options: Sequence[str], *, returns_output: bool = False
) -> str:
    """Run the command of a stage. If the command fails, exit with its status.

    If the command succeeds although a signal asked it to stop, exit with 128 + n, where n is the signal.

    Args:
        launcher: the beginning of the command line, before the script.
        returns_output: if True, return standard output and do not print it. If False, return "".
    """
    print(f"\n== {stage}", flush=True)
    command = [*launcher, str(Path(__file__).resolve().parent / script), *options]
    output = subprocess.PIPE if returns_output else None
    with (
        subprocess.Popen(command, stdout=output, encoding="utf-8", errors="replace") as process,
        _signals_belong_to(process) as received,
    ):
        text, _ = process.communicate()
    if process.returncode:
        sys.exit(_exit_status(stage, process.returncode))
    if received:  # too late to stop the stage
        name = signal.Signals(received[0]).name
        print(f"error: {name} received: stopped after {stage}; run the same command again to continue", file=sys.stderr)
        sys.exit(128 + received[0])
    return text or ""


def _exit_status(stage: str, returncode: int) -> int:
    """Return the exit status for a failed stage: that of its command, or 128 + n if the signal n killed the command."""
    if returncode > 0:
        return returncode
    print(f"error: {stage}: ended by {signal.Signals(-returncode).name}", file=sys.stderr)
    return 128 - returncode


@contextmanager
def _signals_belong_to(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Let a child process handle Ctrl-C and SIGTERM, so that it can save a checkpoint before it ends.

    The parent process forwards SIGTERM. It does not forward Ctrl-C, because the child process also receives Ctrl-C. The
    context manager gives a list to which it appends the signals.
    """
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        received.append(number)
        if number == signal.SIGTERM:
            process.send_signal(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_command(main)

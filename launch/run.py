"""All stages of one config: tokenize, train, evaluate, sample. Finished stages are skipped."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from data_tools.corpus import find_complete, tokenize_corpus
from data_tools.request import TokenizeRequest
from launch.cli import ArgumentParser, add_config_options, run_command, start_logging
from launch.tokenize_corpus import ProgressDisplay, print_shards
from pipeline.config import Config
from pipeline.config_files import load_config
from pipeline.continuation import continue_prompt
from pipeline.distributed import join_world
from pipeline.evaluation.tasks import EvaluationOptions, find_results, format_table, run_tasks
from pipeline.training_run import train


def main() -> None:
    """Parse, load the config, run what is missing."""
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.set)
    start_logging()
    tokenize(config)
    title("train")
    train(config)
    evaluate(config)
    sample(config)


def parse_arguments() -> argparse.Namespace:
    """``--config`` and ``--set``."""
    parser = ArgumentParser(
        description=__doc__, example="python launch/run.py --config ds_configs/ddp.json ds_configs/quickstart.json"
    )
    add_config_options(parser)
    return parser.parse_args()


def tokenize(config: Config) -> None:
    """Stage 1, into ``data.path``."""
    title("tokenize")
    given = {key: value for key, value in config.tokenize.model_dump(exclude={"input"}).items() if value is not None}
    request = TokenizeRequest(inputs=tuple(config.tokenize.input), out=Path(config.data.path), **given)
    manifest = find_complete(request)
    if manifest is None:
        with closing(ProgressDisplay()) as display:
            manifest = tokenize_corpus(request, display.update)
    print_shards(manifest, request)


def evaluate(config: Config) -> None:
    """Stage 3, the tasks of ``evaluation.tasks`` on the last checkpoint."""
    title("evaluate")
    run_folder = Path(config.run.out_dir)
    results = find_results(run_folder, config.evaluation.tasks, config.schedule.max_steps)
    if results is None:
        with join_world(config.run, process_group=False) as world:
            results, _ = run_tasks(run_folder, config.evaluation.tasks, EvaluationOptions(), world)
    print(format_table(results))


def sample(config: Config) -> None:
    """Let the model speak."""
    title("sample")
    with join_world(config.run, process_group=False) as world:
        print(continue_prompt(Path(config.run.out_dir), config.sample, config.run.seed, world.device))


def title(stage: str) -> None:
    """A heading on the console."""
    print(f"\n== {stage}", flush=True)


if __name__ == "__main__":
    run_command(main)

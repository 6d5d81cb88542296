"""Write a run config to start from, show a config and where each key was set, or explain the keys."""

import argparse
import json
from pathlib import Path
from typing import Any

from launch.cli import ArgumentParser, add_config_options, local_path, run_command
from data_tools.errors import PROJECT, UserError
from data_tools.storage.atomic import write_bytes_durably
from data_tools.storage.json_values import dotted_keys
from pipeline.config.loading import dump_config, load_config_with_origins
from pipeline.config.reference import format_keys
from pipeline.config.schema import Config

#: The keys that most runs set. ``init`` writes these keys with their defaults.
FIRST_KEYS = (
    "run.out_dir",
    "run.precision",
    "run.seed",
    "model.preset",
    "tokenize.source",
    "tokenize.input",
    "data.path",
    "batch.tokens_per_step",
    "batch.micro_batch_size",
    "optimizer.learning_rate",
    "schedule.name",
    "schedule.warmup_steps",
    "schedule.max_steps",
    "checkpoint.every_steps",
    "evaluation.every_steps",
    "evaluation.tasks",
)


def main() -> None:
    arguments = build_parser().parse_args()
    arguments.run(arguments)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, example="gpt2-pipeline config show --config zero1 quickstart")
    commands = parser.add_subparsers(required=True, metavar="init|show|keys")
    for add_command in (_add_init, _add_show, _add_keys):
        add_command(commands)
    return parser


def _add_init(commands: Any) -> None:
    description = (
        "Write a new run config with the keys that most runs set, at their defaults. The file sets no backend, so "
        "that you can choose one, as in --config fsdp FILE. gpt2-pipeline config keys explains all keys."
    )
    example = "gpt2-pipeline config init my_run.json"
    parser = commands.add_parser("init", help="write a first config", description=description, example=example)
    parser.add_argument("file", type=local_path, metavar="FILE", help="a JSON file that does not exist yet")
    parser.set_defaults(run=lambda arguments: write_first_config(arguments.file))


def _add_show(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        config, origins = load_config_with_origins(arguments.config, arguments.set, arguments.deepspeed)
        print(json.dumps(dump_config(config), indent=2) if arguments.json else format_config(config, origins))

    description = "Show the config that a run would use: every key, its value, and the file or option that sets it."
    example = "gpt2-pipeline config show --config zero1 quickstart --set schedule.max_steps=500"
    parser = commands.add_parser("show", help="show a resolved config", description=description, example=example)
    add_config_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, which --config accepts")
    parser.set_defaults(run=run)


def _add_keys(commands: Any) -> None:
    description = "Explain the keys of a run config: the default and the meaning of each key."
    example = "gpt2-pipeline config keys schedule"
    parser = commands.add_parser("keys", help="explain all keys", description=description, example=example)
    parser.add_argument(
        "wanted", nargs="?", default="", metavar="KEY", help="a section or a key, such as run.compile (default: all)"
    )
    parser.set_defaults(run=lambda arguments: print(format_keys(arguments.wanted)))


def write_first_config(path: Path) -> None:
    """Write the keys of ``FIRST_KEYS`` and their defaults into a new file. Raises UserError if this fails."""
    content: dict[str, dict[str, Any]] = {}
    defaults = dump_config(Config())
    for key in FIRST_KEYS:
        section, name = key.split(".")
        content.setdefault(section, {})[name] = defaults[section][name]
    if path.exists():
        raise UserError(f"{path}: exists already; name a new file")
    try:
        write_bytes_durably(path, f"{json.dumps(content, indent=2)}\n".encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name a file in a writable folder") from None
    print(f"wrote {path}; this command explains all keys: {PROJECT} config keys")


def format_config(config: Config, origins: dict[str, str]) -> str:
    """Return one line per key: the key, its value as JSON, and the file or option that set it."""
    values = [(key, json.dumps(value)) for key, value in dotted_keys(dump_config(config))]
    key_width = max(len(key) for key, _ in values)
    value_width = min(max(len(value) for _, value in values), 40)
    lines = [f"{key:<{key_width}}  {value:<{value_width}}  {origins.get(key, '')}".rstrip() for key, value in values]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)

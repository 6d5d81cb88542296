"""Create the log sinks of a run. Each sink writes or sends the run's rows of metrics."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.run_folder.sinks.console import Console
from pipeline.run_folder.sinks.csv_file import CsvFile
from pipeline.run_folder.sinks.jsonl import MetricsFile
from pipeline.run_folder.sinks.mlflow_run import MlflowRun, check_mlflow
from pipeline.run_folder.sinks.service import ServiceSink
from pipeline.run_folder.sinks.sink import Sink
from pipeline.run_folder.sinks.tensorboard import TensorBoardLog, check_tensorboard
from pipeline.run_folder.sinks.wandb_run import WandbRun, check_wandb, wandb_is_disabled

__all__ = ["SERVICES", "ServiceSink", "Sink", "check_sinks", "create_sinks"]

log = logging.getLogger(__name__)

#: Service -> function that raises ConfigError if the service cannot be used here. Its argument is ``logging.project``.
SERVICES = {"wandb": check_wandb, "mlflow": check_mlflow}


def check_sinks(names: Sequence[str], project: str) -> None:
    """Raise ConfigError if a sink cannot be used, for example because its package is not installed.

    ``project`` is the value of ``logging.project``.
    """
    for name in names:
        if name == "tensorboard":
            check_tensorboard()
        elif name in SERVICES:
            SERVICES[name](project)


def create_sinks(names: Sequence[str], run_folder: Path, project: str, *, waits_for_checkpoint: bool) -> list[Sink]:
    """Create the sinks with the given names (see ``logging.sinks``).

    The sink of ``metrics.jsonl`` is first, because other sinks read this file. If the user has disabled W&B, the sink
    of W&B is left out. ``project`` and ``waits_for_checkpoint`` are the values of ``logging.project`` and
    ``logging.wait_for_checkpoint``.
    """
    create: dict[str, Callable[[], Sink]] = {
        "jsonl": lambda: MetricsFile(run_folder),
        "csv": lambda: CsvFile(run_folder),
        "tensorboard": lambda: TensorBoardLog(run_folder),
        "console": Console,
        "wandb": lambda: ServiceSink(WandbRun(project, run_folder), run_folder, waits=waits_for_checkpoint),
        "mlflow": lambda: ServiceSink(MlflowRun(project), run_folder, waits=waits_for_checkpoint),
    }
    if "wandb" in names and wandb_is_disabled():
        log.info("wandb is disabled by its own setting mode (WANDB_MODE), so it gets no rows")
        names = [name for name in names if name != "wandb"]
    return [create[name]() for name in sorted(names, key=lambda name: name != "jsonl")]

"""Create the log sinks of a run: one file per sink, one record for all."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.run_folder.sinks.console import Console
from pipeline.run_folder.sinks.csv_file import CsvFile
from pipeline.run_folder.sinks.jsonl import MetricsFile
from pipeline.run_folder.sinks.sink import Sink
from pipeline.run_folder.sinks.tensorboard import TensorBoardLog

__all__ = ["Sink", "create_sinks"]


def create_sinks(names: Sequence[str], run_folder: Path) -> list[Sink]:
    """Return the sinks with these names, see ``logging.sinks``. ``metrics.jsonl`` comes first, because others read it.

    Raises KeyError if there is no sink with a name.
    """
    create = {
        "jsonl": lambda: MetricsFile(run_folder),
        "csv": lambda: CsvFile(run_folder),
        "tensorboard": lambda: TensorBoardLog(run_folder),
        "console": Console,
    }
    return [create[name]() for name in sorted(names, key=lambda name: name != "jsonl")]

"""Write the results of an evaluation to files."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import one_line, one_line_write_errors
from data_tools.storage.atomic import write_bytes_durably, write_json_durably
from data_tools.storage.files import is_remote, is_writable, require_writable
from pipeline.errors import ConfigError
from pipeline.evaluation.protocols import Figures
from pipeline.evaluation.results import VALIDATION, Results
from pipeline.run_folder.layout import EVALUATION_FOLDER, TENSORBOARD_FOLDER

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """The places where an evaluation writes its results. At a place that is None, nothing is written.

    Args:
        folder: gets one JSON file per task.
        events: the folder of the run's TensorBoard events.
        examples: the JSONL file for the scores of each example.
    """

    folder: Path | None
    events: Path | None
    examples: Path | None

    def write(self, results: Results, examples: Sequence[Figures], step: int) -> list[Path]:
        """Write the results of the checkpoint of ``step``. Return the JSON and JSONL files."""
        files = []
        if self.folder:
            with one_line_write_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                for task, result in results.items():
                    files.append(self.folder / f"{task}.json")
                    write_json_durably(files[-1], result)
        if self.events:
            _write_events(results, self.events, step)
        if self.examples:
            with one_line_write_errors(self.examples):
                write_bytes_durably(self.examples, "".join(json.dumps(example) + "\n" for example in examples).encode())
            files.append(self.examples)
        return files


def choose_output(
    checkpoint: Path | str, run_folder: Path, tasks: Sequence[str], out: Path | None, examples: Path | None
) -> Output:
    """Choose where to write the results, and check before hours of scoring that they can be written.

    If the run folder cannot be written, log a warning.

    Args:
        checkpoint: what the user named. If it is a URL, the results are not written to ``run_folder``, a local copy.
        out: the folder that the user wants. None means the run folder.
        examples: the file that the user wants for the scores of each example, or None.

    Raises:
        ConfigError: ``examples`` cannot be written, or ``tasks`` have no examples.
        DataError: ``out`` cannot be written.
    """
    if examples:
        _check_examples_file(examples, tasks)
    if out is not None:
        require_writable(out, "--out")
        return Output(out, None, examples)
    if is_remote(str(checkpoint)):
        return Output(None, None, examples)
    folder = run_folder / EVALUATION_FOLDER
    if is_writable(folder):
        return Output(folder, run_folder / TENSORBOARD_FOLDER, examples)
    log.warning("%s cannot be written: the results are only printed; --out DIR writes them elsewhere", run_folder)
    return Output(None, None, examples)


def _check_examples_file(path: Path, tasks: Sequence[str]) -> None:
    if set(tasks) == {VALIDATION}:
        raise ConfigError(f"--save-examples {path}: {VALIDATION} has no examples; leave it out, or name other --tasks")
    if path.is_dir() or not path.parent.is_dir() or not is_writable(path):
        raise ConfigError(
            f"--save-examples {path}: cannot be written; give a file in a folder that exists and that you may write to"
        )


def _write_events(results: Results, folder: Path, step: int) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import
    except Exception as error:  # noqa: BLE001 - a damaged package may raise anything
        log.warning("TensorBoard cannot be imported (%s), so only the JSON files have the results", one_line(error))
        return
    with SummaryWriter(str(folder)) as writer:
        for task, result in results.items():
            for key, value in result.items():
                if isinstance(value, float):
                    writer.add_scalar(f"evaluation/{task}_{key}", value, step)

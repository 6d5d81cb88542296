"""Write TensorBoard events: metrics, generated text, charts and hyperparameters."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import install_command, one_line
from pipeline.errors import ConfigError
from pipeline.run_folder.layout import TENSORBOARD_FOLDER
from pipeline.run_folder.metrics import DATASET_LOSS_PREFIX, LAYER_PREFIX, SAMPLE_KEY, TASK_PREFIX, read_metrics
from pipeline.run_folder.sinks.sink import Row, Sink

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

#: Row key -> TensorBoard tag. Other keys are not written. TensorBoard sorts groups by name, so ``loss`` comes first.
TENSORBOARD_TAGS = {
    "loss": "loss/training",
    "val_loss": "loss/validation",
    "val_ema_loss": "loss/validation_ema",
    "lr": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "loss_scale": "optimizer/loss_scale",
    "val_perplexity": "perplexity/validation",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "step_ms": "speed/step_ms",
    "data_wait_share": "speed/data_wait_share",
    "compute_ms_min": "ranks/compute_ms_min",
    "compute_ms_mean": "ranks/compute_ms_mean",
    "compute_ms_max": "ranks/compute_ms_max",
    "data_wait_ms_min": "ranks/data_wait_ms_min",
    "data_wait_ms_mean": "ranks/data_wait_ms_mean",
    "data_wait_ms_max": "ranks/data_wait_ms_max",
    "collective_wait_ms_min": "ranks/collective_wait_ms_min",
    "collective_wait_ms_mean": "ranks/collective_wait_ms_mean",
    "collective_wait_ms_max": "ranks/collective_wait_ms_max",
    "slowest_rank": "ranks/slowest_rank",
    "slowest_ratio": "ranks/slowest_ratio",
    "skipped_steps": "steps/skipped",
    "scored_targets": "steps/scored_targets",
    "peak_memory_gib": "system/peak_memory_gib",
    "save_s": "system/save_s",
    "save_pause_s": "system/save_pause_s",
    "failed_saves": "system/failed_saves",
    "upload_s": "system/upload_s",
    "failed_uploads": "system/failed_uploads",
}

#: The sections of a config that affect the result or the speed.
HYPERPARAMETER_SECTIONS = ("run", "model", "data", "batch", "optimizer", "schedule", "backend")

#: The most important settings. Each name begins with a number, because TensorBoard sorts by name.
FIRST_HYPERPARAMETERS = (
    "backends",
    "optimizer.learning_rate",
    "batch.tokens_per_step",
    "schedule.max_steps",
    "model.n_layer",
    "model.n_embd",
    "run.precision",
    "optimizer.name",
    "data.path",
)

#: The keys of the summary that the HPARAMS page shows.
RESULTS = ("validation_loss", "loss")

_HPARAMS_SUFFIX = ".hparams"  # of the event file with the settings and results

#: TensorBoard's CUSTOM SCALARS page: group -> chart -> regular expressions of its tags.
TENSORBOARD_LAYOUT = {
    "loss": {
        "training and validation": ["Multiline", ["^loss/training$", "^loss/validation$"]],
        "validation, each dataset of a mixture": ["Multiline", ["^loss/validation"]],
    },
    "optimizer": {
        "learning rate": ["Multiline", ["^optimizer/learning_rate$"]],
        "gradient norm before clipping": ["Multiline", ["^optimizer/grad_norm$"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["^speed/tokens_per_s$"]],
        "MFU, and the share of time spent waiting for data": [
            "Multiline",
            ["^speed/mfu$", "^speed/data_wait_share$"],
        ],
    },
}


def check_tensorboard() -> None:
    """Raise ConfigError if TensorBoard cannot be imported, for example because its installation is damaged."""
    try:  # the sink imports these modules with its first row and at the end of the run
        import_module("torch.utils.tensorboard")
        import_module("tensorboard.plugins.hparams.metadata")
    except Exception as error:  # noqa: BLE001 - a damaged package may raise anything
        # Without --force-reinstall, pip keeps damaged files. The second command restores the versions of this project.
        repair = f"python -m pip install --force-reinstall --no-deps tensorboard protobuf && {install_command()}"
        is_missing = isinstance(error, ModuleNotFoundError) and error.name in ("tensorboard", "torch.utils.tensorboard")
        raise ConfigError(
            f"logging.sinks: tensorboard cannot be imported ({one_line(error)}): "
            f"{install_command() if is_missing else repair}, or leave tensorboard out of logging.sinks"
        ) from None


class TensorBoardLog(Sink):
    """Writes rows of metrics as TensorBoard events. If the disk is full or read-only, some events are lost.

    If the run goes back to an earlier step, TensorBoard hides the events of later steps.
    """

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._folder = str(run_folder / TENSORBOARD_FOLDER)
        self._writer: SummaryWriter | None = None
        self._resources = ExitStack()  # until the end of the run
        self._config: dict[str, Any] = {}
        self._purge_step: int | None = None  # the first step whose old events are hidden

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        self._resources.enter_context(_quiet_writer_threads())
        self._config = config
        self._purge_step = resumed_step + 1 if resumed_step else 0

    def write(self, row: Row) -> None:
        """Write one row. If a write fails, some events are lost, and the next call opens a new event file."""
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self._writer = SummaryWriter(self._folder, purge_step=self._purge_step)
                self._writer.add_custom_scalars(TENSORBOARD_LAYOUT)
                self._purge_step = None
            for key, value in row.items():
                if value is not None and (tag := tensorboard_tag(key)):
                    self._writer.add_scalar(tag, value, row["step"])
            if SAMPLE_KEY in row:
                # A Markdown code block is the only text that TensorBoard shows unchanged.
                block = "".join(f"    {line}\n" for line in row[SAMPLE_KEY].splitlines())
                self._writer.add_text("sample", block, row["step"])
        except OSError as error:
            log.warning("cannot write TensorBoard events (%s); some are lost, metrics.jsonl has them", error.strerror)
            self._writer = None

    def rewind(self, step: int) -> None:
        self._close()
        self._writer, self._purge_step = None, step + 1

    def end(self, summary: Row) -> None:
        """Write the settings and the last results for the page HPARAMS, and close the event file."""
        settings = hyperparameters(self._config, read_metrics(self._run_folder))
        results = {f"results/{key}": summary[key] for key in RESULTS if summary.get(key) is not None}
        if self._writer:
            with suppress(OSError):  # an earlier row has logged the error
                self._write_hparams(settings, results)
        self._close()
        self._resources.close()

    def _write_hparams(self, settings: dict[str, Any], results: dict[str, Any]) -> None:
        """Write the settings and results to a file of their own, in place of the files of earlier starts of the run.

        TensorBoard shows the first settings that it finds in the folder of a run, and the last results.
        """
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for earlier in Path(self._folder).glob(f"*{_HPARAMS_SUFFIX}"):
            earlier.unlink()
        with SummaryWriter(self._folder, filename_suffix=_HPARAMS_SUFFIX) as writer:
            for summary in hparams(settings, results):
                writer.file_writer.add_summary(summary)
            for tag, value in results.items():
                writer.add_scalar(tag, value)

    def _close(self) -> None:
        if self._writer:
            with suppress(OSError):
                self._writer.close()


@contextmanager
def _quiet_writer_threads() -> Iterator[None]:
    """Return a context manager. Inside its block, Python prints no traceback if TensorBoard's thread cannot write.

    TensorBoard raises the same error again at its next call, and the sink then logs one line.
    """
    before = threading.excepthook

    def report(arguments: threading.ExceptHookArgs) -> None:
        is_write = isinstance(arguments.exc_value, OSError) and type(arguments.thread).__name__ == "_AsyncWriterThread"
        if not is_write:
            before(arguments)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = before


def hyperparameters(config: dict[str, Any], rows: Sequence[Row]) -> dict[str, bool | int | float | str]:
    """Return the names and values that TensorBoard's page HPARAMS shows for a run.

    The value ``backends`` lists all backends of the run, because a run can be resumed with another backend.
    """
    starts = [row["started"] for row in rows if "started" in row]
    backends = dict.fromkeys(f"{start['backend']}, {start['world_size']} x {start['device']}" for start in starts)
    settings = {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for section in HYPERPARAMETER_SECTIONS
        for key, value in ((f"{section}.{name}", value) for name, value in config.get(section, {}).items())
    }
    settings["backends"] = ", then ".join(backends)
    for number, key in enumerate(FIRST_HYPERPARAMETERS, start=1):
        if key in settings:
            settings[f"{number} {key}"] = settings.pop(key)
    return settings


def tensorboard_tag(key: str) -> str | None:
    """Return the TensorBoard tag for a key of the metrics, or None if TensorBoard does not show the key."""
    if key.startswith(DATASET_LOSS_PREFIX):
        return f"loss/validation/{key.removeprefix(DATASET_LOSS_PREFIX)}"
    if key.startswith(TASK_PREFIX):
        return f"tasks/{key.removeprefix(TASK_PREFIX)}"
    if key.startswith(LAYER_PREFIX):
        return f"per_{key}"
    return TENSORBOARD_TAGS.get(key)

"""Send a run's rows of metrics to W&B. With ``WANDB_MODE=offline``, the rows are written into the run folder."""

import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import install_command, one_line
from data_tools.storage.json_values import dotted_keys
from pipeline.errors import ConfigError
from pipeline.run_folder.sinks.service import Service
from pipeline.run_folder.sinks.sink import Row

FLUSH_INTERVAL_S = 0.5
_MODES_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")


def check_wandb(project: str) -> None:
    """Raise ConfigError if W&B cannot be used here, for example because the user is not logged in."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"logging.sinks: wandb cannot be imported ({error}): {install_command('wandb')}") from None
    try:
        wandb.Settings(project=project)
    except wandb.errors.UsageError as error:
        raise ConfigError(f"logging.project: wandb cannot use this name: {one_line(error)}") from None
    try:
        mode = wandb.setup().settings.mode
    except (ValueError, wandb.errors.Error) as error:  # ValueError: pydantic's error for an invalid value
        raise ConfigError(
            f"logging.sinks: a setting of wandb is invalid: {one_line(error)}; correct the environment variable, such "
            "as WANDB_MODE for the setting mode, or the settings file of wandb"
        ) from None
    if mode in _MODES_WITHOUT_LOGIN:
        return
    try:
        wandb.login(verify=False)
    except (ValueError, wandb.errors.Error) as error:
        raise ConfigError(
            f"logging.sinks: wandb cannot log in ({one_line(error)}); run 'wandb login', or set WANDB_MODE=offline and "
            "upload the run later with 'wandb sync'"
        ) from None


def wandb_is_disabled() -> bool:
    """Return whether the user has disabled W&B, for example with ``WANDB_MODE=disabled``."""
    try:
        import wandb
    except ImportError:
        return False
    return bool(wandb.setup().settings.mode == "disabled")


class WandbRun(Service):
    """A run in W&B. Each row of metrics becomes one row of the run's history, with ``step`` as the x-axis."""

    name = "wandb"

    def __init__(self, project: str, run_folder: Path) -> None:
        self._project = project
        self._run_folder = run_folder
        self._run: Any = None

    def connect(self, config: dict[str, Any], run_id: str | None) -> str:
        import wandb

        run_id = run_id or secrets.token_hex(4)
        self._run = wandb.init(
            project=self._project,
            name=config["run"]["name"],
            id=run_id,
            resume="allow",
            dir=str(self._run_folder),
            settings=wandb.Settings(console="off", silent=True, x_transaction_log_flush_interval=FLUSH_INTERVAL_S),
        )
        self._run.config.update(dict(dotted_keys(config)), allow_val_change=True)
        # W&B's own step must not decrease, but the row of a save comes after rows of later steps.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step", step_sync=False)
        return run_id

    def send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log(row)
        time.sleep(2 * FLUSH_INTERVAL_S)  # W&B then has the rows in its file, which survives a kill of all processes

    def attach(self, files: Sequence[Path]) -> None:
        for file in files:
            copy = Path(self._run.dir, file.name)  # W&B would link a file in another folder, and print a warning
            shutil.copyfile(file, copy)
            self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def end(self, summary: Row) -> None:
        self._run.summary.update(summary)
        self._run.finish(exit_code=int(summary["state"] == "failed"))

"""Send a run's rows of metrics to MLflow. ``MLFLOW_TRACKING_URI`` contains the address of the server."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import install_command, one_line
from data_tools.storage.json_values import dotted_keys
from pipeline.errors import ConfigError
from pipeline.run_folder.metrics import SAMPLE_KEY
from pipeline.run_folder.sinks.service import Service
from pipeline.run_folder.sinks.sink import Row

MOST_METRICS, MOST_PARAMS = 1000, 100  # the limits of one request
LONGEST_VALUE = 500  # characters of a parameter or tag; every version of MLflow accepts this number
LONGEST_EXPERIMENT = 500  # characters

_ADDRESS_ADVICE = "set MLFLOW_TRACKING_URI to the URL of an MLflow server, such as http://localhost:5000"
_FILE_STORE_VARIABLE = "MLFLOW_ALLOW_FILE_STORE"  # without it, MLflow refuses a folder as the tracking URI

#: Every row has this key, but MLflow gets it only with training rows.
_TIME_KEY = "elapsed_s"

_STATUSES = {"finished": "FINISHED", "interrupted": "KILLED", "superseded": "KILLED"}


def check_mlflow(experiment: str) -> None:
    """Raise ConfigError if a run cannot be sent to MLflow, for example because the tracking URI is missing."""
    try:
        import mlflow
    except ImportError as error:
        raise ConfigError(f"logging.sinks: mlflow cannot be imported ({error}): {install_command('mlflow')}") from None
    if len(experiment) > LONGEST_EXPERIMENT:
        raise ConfigError(
            f"logging.project: mlflow allows at most {LONGEST_EXPERIMENT} characters, not {len(experiment)}"
        )
    is_address_set: Callable[[], bool] = mlflow.is_tracking_uri_set
    if not is_address_set():  # otherwise MLflow would write into the working folder
        raise ConfigError(f"logging.sinks: mlflow needs an address; {_ADDRESS_ADVICE}")
    try:
        mlflow.MlflowClient()
    except Exception as error:  # noqa: BLE001 - a store may raise anything
        uri = mlflow.get_tracking_uri()
        if _FILE_STORE_VARIABLE in str(error):
            raise ConfigError(
                f"logging.sinks: mlflow writes into a folder ({uri}) only if you set {_FILE_STORE_VARIABLE}=true, too"
            ) from None
        raise ConfigError(f"logging.sinks: mlflow cannot use {uri} ({one_line(error)}); {_ADDRESS_ADVICE}") from None


class MlflowRun(Service):
    """A run in MLflow. Numbers are sent as metrics, completions as text files, other values as tags.

    Null values are left out.
    """

    name = "mlflow"

    def __init__(self, experiment: str) -> None:
        self._experiment = experiment
        self._client: Any = None
        self._run_id = ""
        self._last_steps: dict[str, int] = {}  # metric -> step of its last value

    def connect(self, config: dict[str, Any], run_id: str | None) -> str:
        import mlflow

        self._client = self._client or mlflow.MlflowClient()
        if run_id is None:
            experiment = self._client.get_experiment_by_name(self._experiment)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
            run_id = self._client.create_run(experiment_id, run_name=config["run"]["name"]).info.run_id
            self._last_steps = {}
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._run_id = str(run_id)
        self._log_config(config)
        return self._run_id

    def _log_config(self, config: dict[str, Any]) -> None:
        """Log the config as parameters. MLflow cannot change a parameter, so a changed value becomes a tag."""
        from mlflow.entities import Param, RunTag

        values = {key: str(value)[:LONGEST_VALUE] for key, value in dotted_keys(config)}
        logged = self._client.get_run(self._run_id).data.params
        tags = [RunTag(f"resumed.{key}", value) for key, value in values.items() if logged.get(key, value) != value]
        params = [Param(key, value) for key, value in values.items() if key not in logged]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + MOST_PARAMS])
        self._client.log_batch(self._run_id, tags=tags[:MOST_PARAMS])

    def send(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value, step in self._numbers(rows)]
        tags = {key: str(value)[:LONGEST_VALUE] for row in rows for key, value in _other_values(row)}
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + MOST_METRICS])
        if tags:
            self._client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for row in rows:
            if SAMPLE_KEY in row:
                self._client.log_text(self._run_id, row[SAMPLE_KEY], f"samples/step_{row['step']:08d}.txt")
        self._last_steps.update({metric.key: metric.step for metric in metrics})

    def _numbers(self, rows: Sequence[Row]) -> Iterator[tuple[str, float, int]]:
        """Yield (key, number, step) for each number of the rows, once per key and step."""
        last = dict(self._last_steps)
        for row in rows:
            numbers = {key: value for key, value in row.items() if type(value) in (int, float) and key != "step"}
            if "loss" not in row:
                numbers.pop(_TIME_KEY, None)  # several rows of a step have it
            for key, value in numbers.items():
                if last.get(key) != row["step"]:
                    last[key] = row["step"]
                    yield key, float(value), row["step"]

    def attach(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self._run_id, str(file))

    def end(self, summary: Row) -> None:
        from mlflow.entities import Metric, RunTag

        now, step = int(time.time() * 1000), summary.get("step", 0)
        numbers = {f"final/{key}": value for key, value in summary.items() if type(value) in (int, float)}
        metrics = [Metric(key, float(value), now, step) for key, value in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics, tags=[RunTag("state", summary["state"])])
        self._client.set_terminated(self._run_id, _STATUSES.get(summary["state"], "FAILED"))


def _other_values(row: Row) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a row that are texts, lists or dicts, without completions. Dicts are flattened."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", content) for inner, content in dotted_keys(value))
        elif isinstance(value, str | list) and key != SAMPLE_KEY:
            yield key, value

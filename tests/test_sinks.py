"""Every sink has the rows of ``metrics.jsonl``, once per step, after a crash and a rollback."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools.storage.json_values import dotted_keys
from pipeline.distributed.rendezvous import free_port
from pipeline.run_folder.metrics import read_metrics
from tests.support.live_run import LiveRun
from tests.support.runs import REPOSITORY, TINY_BYTE_RUN, Sections, child_environment, merged, train_run

mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
pytest.importorskip("wandb", reason="needs the extra wandb")

from tests.support.wandb_files import read_offline_run  # noqa: E402 - imports wandb

FAULTY_TRAIN = REPOSITORY / "tests" / "support" / "faulty_train.py"
STEPS, EVERY_STEPS, CRASHED_AT, SPIKE_AT = 18, 4, 10, 14
SERVER_STARTS_WITHIN_S = 400.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start MLflow's server, and return its address. A database instead of files would take a minute to create."""
    folder = tmp_path_factory.mktemp("mlflow")
    address = f"http://127.0.0.1:{(port := free_port())}"
    stores = ["--backend-store-uri", f"file://{folder}/runs", "--artifacts-destination", str(folder / "files")]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *stores]
    environment = {**child_environment(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + SERVER_STARTS_WITHIN_S
        while not _is_healthy(address):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def _is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health") as answer:
            return answer.status == 200
    except OSError:
        return False


def sections_of(byte_corpus: Path) -> Sections:
    """Return a run with all sinks, which is rolled back after a spike at step ``SPIKE_AT``."""
    changes: Sections = {
        "data": {"path": str(byte_corpus)},
        "batch": {"tokens_per_step": 192, "micro_batch_size": 1},
        "schedule": {"max_steps": STEPS},
        "checkpoint": {"every_steps": EVERY_STEPS},
        "evaluation": {"every_steps": 5},
        "guard": {"spike_zscore": 12.0, "spike_window": 10},
        "logging": {"sinks": ["jsonl", "csv", "wandb", "mlflow"], "project": "sinks"},
    }
    return merged(TINY_BYTE_RUN, changes)


def state_of(folder: Path, service: str) -> dict[str, Any]:
    path = folder / f"{service}_run.json"
    return json.loads(path.read_text()) if path.exists() else {"run_id": None, "sent_step": -1}


def crash_and_continue(backend: str, processes: int, folder: Path, sections: Sections) -> dict[str, str]:
    """Kill a run at ``CRASHED_AT`` and continue it to its end. Returns the ids before the crash, by service."""
    services = ("wandb", "mlflow")
    with LiveRun(backend, folder, sections, processes, hold_after=CRASHED_AT) as run:
        run.wait_until(lambda: all(state_of(folder, name)["sent_step"] >= 2 * EVERY_STEPS for name in services))
        run.wait_until(lambda: run.last_step() == CRASHED_AT)
        ids = {name: state_of(folder, name)["run_id"] for name in services}
    result = train_run(backend, folder, sections, processes, FAULTY_TRAIN)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"rolled back to {folder}/checkpoints/step_{3 * EVERY_STEPS:08d}" in result.stdout + result.stderr
    return ids


def assert_csv_equals(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "metrics.csv").open(newline="") as file:
        table = [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    texts = ("ended", "slowest_host")
    read = [{key: cell if key in texts else json.loads(cell) for key, cell in row.items()} for row in table]
    assert read == [{key: value for key, value in row.items() if value is not None} for row in rows]


def assert_wandb_equals(folder: Path, run_id: str, rows: list[dict[str, Any]]) -> None:
    found = read_offline_run(folder, run_id)
    assert found["history"] == [dict(dotted_keys(row)) for row in rows]
    assert found["config"]["optimizer.learning_rate"] == TINY_BYTE_RUN["optimizer"]["learning_rate"]
    assert found["summary"]["state"] == "finished" and found["summary"]["validation_loss"] > 0
    assert {"config.json", "report.html", "metrics.jsonl"} <= found["files"]


def assert_mlflow_equals(uri: str, run_id: str, rows: list[dict[str, Any]]) -> None:
    client = mlflow.MlflowClient(uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.tags["state"] == "finished"
    assert run.data.params["optimizer.learning_rate"] == str(TINY_BYTE_RUN["optimizer"]["learning_rate"])
    assert {"config.json", "report.html", "metrics.jsonl"} <= {file.path for file in client.list_artifacts(run_id)}
    for key in ("loss", "grad_norm", "lr", "tokens_per_s", "val_loss", "save_s", "skipped_steps"):
        history = client.get_metric_history(run_id, key)
        expected = [(row["step"], row[key]) for row in rows if key in row]
        assert sorted((point.step, point.value) for point in history) == sorted(expected), key
    for key in run.data.metrics:
        steps = [point.step for point in client.get_metric_history(run_id, key)]
        assert len(steps) == len(set(steps)), key


@pytest.mark.parametrize(("backend", "processes", "store"), [("ddp", 1, "server"), ("zero3", 2, "files")])
def test_every_sink_has_every_row_once(
    backend: str,
    processes: int,
    store: str,
    byte_corpus: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``test_parity`` checks that all backends log rows of the same names."""
    uri = request.getfixturevalue("server") if store == "server" else f"file://{tmp_path}/mlflow"
    environment = {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "FAULTY_SAMPLES": str(4 * (SPIKE_AT - 1) + 1),
        "FAULT": "1000",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    ids = crash_and_continue(backend, processes, folder, sections_of(byte_corpus))
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1)), "a gap or a duplicate"
    assert rows[-1]["ended"] == "finished" and len([row for row in rows if "left_out_samples" in row]) == 1
    for service, run_id in ids.items():
        assert state_of(folder, service)["run_id"] == run_id, "the run of the service continues"
    assert_csv_equals(folder, rows)
    assert_wandb_equals(folder, ids["wandb"], rows)
    assert_mlflow_equals(uri, ids["mlflow"], rows)

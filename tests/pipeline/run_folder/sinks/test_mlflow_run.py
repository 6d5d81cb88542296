"""A mistake in MLflow's settings stops a run before training, and a server that is away is counted and logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.distributed.environment import set_mlflow_defaults
from pipeline.distributed.rendezvous import free_port
from pipeline.errors import ConfigError
from pipeline.run_folder.sinks import check_sinks, create_sinks

pytest.importorskip("mlflow", reason="needs the extra mlflow")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TRACKING_URI", "ALLOW_FILE_STORE", "HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_{name}", "")  # the end of the test then removes what the test sets
        monkeypatch.delenv(f"MLFLOW_{name}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("uri", "project", "said"),
    [
        (None, "x", "logging.sinks: mlflow needs an address; set MLFLOW_TRACKING_URI .*http://localhost:5000$"),
        ("localhost:5000", "x", r"logging.sinks: mlflow cannot use localhost:5000 \(.*\); set MLFLOW_TRACKING_URI"),
        ("file:///tmp/x", "x", r"mlflow writes into a folder \(file:///tmp/x\) only .*MLFLOW_ALLOW_FILE_STORE=true"),
        ("http://localhost:1", "x" * 501, "logging.project: mlflow allows at most 500 characters, not 501"),
    ],
)
def test_a_mistake_is_one_line(
    uri: str | None, project: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=said) as caught:
        check_sinks(["mlflow"], project)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is written into the working folder"


def test_a_server_that_is_away_is_counted_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    set_mlflow_defaults()
    sinks = create_sinks(["jsonl", "mlflow"], tmp_path, "project", waits_for_checkpoint=True)
    for sink in sinks:
        sink.start({"run": {"name": "x"}}, 0)
    for sink in sinks:
        sink.write({"step": 1, "loss": 1.0})
        sink.settle(1)
    for sink in sinks:
        sink.end({"state": "finished", "step": 1})
    assert caplog.text.count("mlflow: cannot send (") == 1 and "Connection refused" in caplog.text
    assert "rows that were not sent: 1" in caplog.text and "failures: 0" not in caplog.text

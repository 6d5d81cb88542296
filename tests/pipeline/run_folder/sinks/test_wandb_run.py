"""A mistake in W&B's settings stops a run before training, and a disabled W&B is left out of the sinks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.run_folder.sinks import ServiceSink, check_sinks, create_sinks

wandb = pytest.importorskip("wandb", reason="needs the extra wandb")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let W&B read its settings again in each test, without the settings files and the login of this machine."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    monkeypatch.undo()
    wandb.teardown()


@pytest.mark.parametrize(
    ("variables", "project", "said"),
    [
        ({"WANDB_MODE": "ofline"}, "x", "logging.sinks: a setting of wandb is invalid: .*mode.*'offline'.*WANDB_MODE"),
        ({"WANDB_MODE": "offline"}, "a/b", "logging.project: wandb cannot use this name: .*'a/b'"),
        ({"WANDB_MODE": "offline"}, "x" * 129, "logging.project: wandb cannot use this name: .*128"),
        ({"WANDB_BASE_URL": "api.wandb.ai"}, "x", "logging.sinks: a setting of wandb is invalid: .*base_url"),
        ({}, "x", r"logging.sinks: wandb cannot log in \(.*\); run 'wandb login', or set WANDB_MODE=offline"),
        ({"WANDB_API_KEY": "short"}, "x", r"logging.sinks: wandb cannot log in \(.*key.*\)"),
    ],
)
def test_a_mistake_is_one_line(
    variables: dict[str, str], project: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said) as caught:
        check_sinks(["wandb"], project)
    assert "\n" not in str(caught.value)


def test_disabled_means_no_rows_and_one_log_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with caplog.at_level(logging.INFO):
        check_sinks(["jsonl", "wandb"], "project")
        sinks = create_sinks(["jsonl", "wandb"], tmp_path, "project", waits_for_checkpoint=True)
    assert len(sinks) == 1 and not isinstance(sinks[0], ServiceSink)
    assert [record.message for record in caplog.records] == [
        "wandb is disabled by its own setting mode (WANDB_MODE), so it gets no rows"
    ]

"""``launch/plan.py`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import launch.plan
from data_tools.errors import UserError
from tests.support.runs import CONFIGS

TINY = ["--set", "model.preset=gpt2-tiny", "batch.tokens_per_step=65536", "--world-size", "4"]


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["plan.py", "--config", str(CONFIGS / "zero1.json"), *TINY, *arguments])
    launch.plan.main()


def test_a_table_of_every_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan(monkeypatch, "--tokens", "1000000", "--mfu", "0.3")
    printed = capsys.readouterr().out
    assert "assumed MFU 0.30" in printed
    assert "1,000,000 tokens" in printed
    for backend in launch.plan.BACKENDS:
        assert printed.count(f"\n{backend} ") == 2  # once for memory and once for speed


def test_json_and_picture(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    plan(monkeypatch, "--backends", "fsdp", "zero1", "--json", "--plot", str(picture))
    plans: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [each["backend"] for each in plans] == ["fsdp", "zero1"]
    for each in plans:
        memory = each["memory"]
        assert memory.pop("total") == sum(memory.values())
        assert each["fits"] and each["largest_micro_batch"] > each["batch"]["micro_batch_size"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_settings_of_the_configs_own_backend_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    buffers = []
    for bucket in (1_000_000, 3_000_000):
        own = f"backend.deepspeed.zero_optimization.reduce_bucket_size={bucket}"
        plan(monkeypatch, "--set", own, "--backends", "zero1", "--json")
        buffers.append(json.loads(capsys.readouterr().out)[0]["memory"]["buffers"])
    assert buffers[1] == 3 * buffers[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h1000"], "--device: h1000 is not known; known are h100-80gb"),
        (["--world-size", "3"], "batch.tokens_per_step .* is not a multiple"),
        (["--world-size", "0"], "--world-size: must be a whole number from 1, it is '0'"),
        (["--mfu", "1.5"], "--mfu"),
        (["--plot", "no/such/folder/plan.png"], "--plot"),
    ],
)
def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(monkeypatch, "--backends", "ddp", *arguments)

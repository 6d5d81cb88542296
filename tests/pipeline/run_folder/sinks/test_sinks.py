"""Every name of ``logging.sinks`` has a sink, and ``metrics.jsonl`` is always the first."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from pipeline.config.schema import SinkName
from pipeline.run_folder.sinks import create_sinks
from pipeline.run_folder.sinks.jsonl import MetricsFile


def test_every_name_has_a_sink(tmp_path: Path) -> None:
    names = list(reversed(get_args(SinkName)))
    sinks = create_sinks(names, tmp_path, "project", waits_for_checkpoint=True)
    assert isinstance(sinks[0], MetricsFile)
    assert len(sinks) == len(names)

"""Config files in the folder of a test, and the error message of a config with mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.loading import load_config
from pipeline.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return a function that writes a config file into the test's folder and returns its path."""

    def write_config(name: str, content: dict[str, Any] | str) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_config


def mistake(files: list[Path], *overrides: str) -> str:
    """Return the one line of the error that loading these raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line

"""Read the checkpoint from which a run starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.state import StateFile, config_section, read_state_file


@dataclass(frozen=True)
class Start:
    """The checkpoint from which a run starts, with the content of its ``state.json``."""

    folder: Path
    state: StateFile

    @classmethod
    def read(cls, folder: Path) -> Start:
        """Read a checkpoint's ``state.json``. Raises CheckpointError if the file is missing or malformed."""
        return cls(folder, read_state_file(folder))

    def setting(self, section: str, key: str) -> Any:
        """Return a value of the config that is stored in the checkpoint, or None if the key is missing."""
        return config_section(self.state.config, section).get(key)

    def __str__(self) -> str:
        return str(self.folder)

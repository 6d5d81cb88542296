"""Save a checkpoint without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.backends import Backend
from pipeline.checkpoint.background import SnapshotTaker
from pipeline.checkpoint.saving import write_checkpoint
from pipeline.checkpoint.state import TrainingState
from pipeline.distributed.world import World


def save_checkpoint(
    run_folder: Path, state: TrainingState, config: dict[str, Any], backend: Backend, world: World, keep_last: int
) -> Path:
    """Save a checkpoint and return its folder. Every rank must call this function."""
    snapshot = SnapshotTaker(backend, world).take(state)
    return write_checkpoint(run_folder, snapshot, config, world, keep_last).folder

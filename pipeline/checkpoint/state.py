"""The position of a run that a checkpoint stores in ``state.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AllowInfNan, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from pipeline.checkpoint.layout import STATE_FILE, read_json_object
from pipeline.errors import CheckpointError


@dataclass(frozen=True)
class GuardState:
    """The step guard's memory."""

    bad_in_a_row: NonNegativeInt = 0
    rollbacks: NonNegativeInt = 0
    skipped_samples: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()  # [first, stop) of skipped batches
    recent: tuple[tuple[float, float], ...] = ()  # loss and gradient norm of the last steps, oldest first


@dataclass(frozen=True)
class TrainingState:
    """The position of a run. ``seed`` and ``samples`` determine the data order and dropout: no RNG state is stored."""

    step: NonNegativeInt  # finished optimizer steps, skipped ones included
    samples: NonNegativeInt  # consumed by all ranks: the position in the data order
    tokens: NonNegativeInt  # target tokens trained on
    updates: NonNegativeInt  # applied optimizer steps: AdamW's step count
    loss_scale: Annotated[PositiveFloat, AllowInfNan(False)] | None  # None if the precision uses no loss scale
    loss_scale_good_steps: NonNegativeInt
    seed: NonNegativeInt
    data_sha256: str | None = None  # of the data set's manifest
    guard: GuardState = field(default_factory=GuardState)


@dataclass(frozen=True, kw_only=True)
class StateFile(TrainingState):
    """All fields of ``state.json``."""

    world_size: PositiveInt  # of the run that wrote the checkpoint
    launch_id: str | None = None  # of the launch that wrote the checkpoint
    versions: dict[str, str]
    config: dict[str, Any]  # resolved


_STATE_FILE_SCHEMA = TypeAdapter(StateFile)


def read_state_file(folder: Path) -> StateFile:
    """Read all of a checkpoint's ``state.json``, or raise CheckpointError if it is missing or malformed."""
    path = folder / STATE_FILE
    content = read_json_object(path)
    try:
        # Strict validation accepts a list for a tuple only if it comes from JSON.
        return _STATE_FILE_SCHEMA.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        mistake = error.errors()[0]
        key = ".".join(map(str, mistake["loc"]))
        raise CheckpointError(f"{path}: malformed ({key}: {mistake['msg']})") from None


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Read a checkpoint's training state and its resolved config. Raises like ``read_state_file``."""
    content = read_state_file(folder)
    state = TrainingState(**{field.name: getattr(content, field.name) for field in fields(TrainingState)})
    return state, content.config


def config_section(content: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a section of a stored config, or an empty one if ``content`` holds anything else there.

    Another version of this program may have written the config.
    """
    section = content.get(key)
    return section if isinstance(section, dict) else {}

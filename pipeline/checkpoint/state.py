"""Define and read ``state.json``, which stores a run's progress in a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AllowInfNan, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from data_tools.shards.manifest import TokenizerRecord
from pipeline.checkpoint.json_files import malformed_error, read_json_object
from pipeline.checkpoint.layout import STATE_FILE


@dataclass(frozen=True)
class GuardState:
    """The state of the step guard, which reacts to bad steps such as loss spikes."""

    bad_in_a_row: NonNegativeInt = 0
    rollbacks: NonNegativeInt = 0
    skipped_samples: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()  # half-open range of each skipped step
    recent: tuple[tuple[float, float], ...] = ()  # (loss, gradient norm) of recent steps, oldest first


@dataclass(frozen=True)
class ValidationHistory:
    """The best validation loss of a run so far, for early stopping and ``checkpoint.keep_best``."""

    best_loss: float | None = None  # None before the first validation
    best_step: NonNegativeInt | None = None
    evaluations_since_best: NonNegativeInt = 0

    def after(self, step: int, loss: float) -> ValidationHistory:
        """Return the history after a further validation. A NaN or infinite loss is never the best.

        The loss at step 0 does not count, because the run has no checkpoint of step 0. In fine-tuning, this loss can be
        lower than all later losses.
        """
        if step == 0:
            return self
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return ValidationHistory(loss, step)
        return replace(self, evaluations_since_best=self.evaluations_since_best + 1)


@dataclass(frozen=True)
class TrainingState:
    """The progress of a run.

    No random generator state is needed, because ``seed`` and ``samples`` determine the data order and dropout.
    """

    step: NonNegativeInt  # finished optimizer steps, including skipped steps
    samples: NonNegativeInt  # consumed by all ranks together: the position in the data order
    tokens: NonNegativeInt  # target tokens that the run has trained on
    updates: NonNegativeInt  # optimizer steps that changed the weights
    loss_scale: Annotated[PositiveFloat, AllowInfNan(False)] | None  # None if the precision uses no loss scale
    loss_scale_good_steps: NonNegativeInt
    seed: NonNegativeInt
    data_sha256: str | None = None  # the hash of the dataset's manifest
    guard: GuardState = field(default_factory=GuardState)
    validation: ValidationHistory = field(default_factory=ValidationHistory)
    optimizer_start: NonNegativeInt = 0  # ``updates`` when the optimizer's state was zero; AdamW counts from there
    tokenizer: TokenizerRecord | None = None  # that made the run's data; None in checkpoints of earlier versions
    evaluation_is_due: bool = False  # a signal stopped the evaluation after ``step``; the next start repeats it


@dataclass(frozen=True, kw_only=True)
class StateFile(TrainingState):
    """The content of ``state.json``: progress, config and package versions of the run that wrote the checkpoint."""

    world_size: PositiveInt
    launch_id: str | None = None
    averaged_steps: tuple[NonNegativeInt, ...] = ()  # the weights are the mean of these steps' checkpoints
    versions: dict[str, str]
    config: dict[str, Any]  # the resolved config


_STATE_FILE_SCHEMA = TypeAdapter(StateFile)


def read_state_file(folder: Path) -> StateFile:
    """Read the ``state.json`` of a checkpoint. Raises CheckpointError if the file is missing or malformed."""
    path = folder / STATE_FILE
    return check_state_file(read_json_object(path), path)


def check_state_file(content: dict[str, Any], path: Path | str) -> StateFile:
    """Check the content of a ``state.json``.

    Earlier versions counted the validation loss at step 0, which ``ValidationHistory.after`` does not count. If this
    was the best loss, the result has an empty history.

    Raises CheckpointError if the content is malformed. The message begins with ``path``.
    """
    try:
        # Strict validation accepts a list in place of a tuple only in JSON text.
        state = _STATE_FILE_SCHEMA.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise malformed_error(path, error) from None
    return replace(state, validation=ValidationHistory()) if state.validation.best_step == 0 else state


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Read a checkpoint's training state and its resolved config.

    Raises CheckpointError if ``state.json`` is missing or malformed.
    """
    content = read_state_file(folder)
    state = TrainingState(**{field.name: getattr(content, field.name) for field in fields(TrainingState)})
    return state, content.config


def config_section(content: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the section ``key`` of a stored config, or an empty dict if the section is missing or malformed."""
    section = content.get(key)
    return section if isinstance(section, dict) else {}


def backend_name(config: dict[str, Any]) -> str:
    """Return the name of the backend in a stored config, such as ``fsdp`` or ``deepspeed ZeRO-3``."""
    backend = config_section(config, "backend")
    name = str(backend.get("name", "unknown"))
    stage = config_section(config_section(backend, "deepspeed"), "zero_optimization").get("stage")
    return name if stage is None else f"{name} ZeRO-{stage}"

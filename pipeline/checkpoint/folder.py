"""A checkpoint folder on disk: names, manifest, state. Whether it is whole: ``verification``."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from data_tools.storage.files import sha256_of_json
from pipeline.errors import CheckpointError
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_PIECES_FILE = re.compile(r"rank_(\d{5,})_(weights|moments)\.safetensors")
_MOST_ELEMENTS = 1 << 48
_SHA256 = re.compile(r"[0-9a-f]{64}")

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers from step to step; part of every checkpoint."""

    bad_in_a_row: Count = 0
    rollbacks: Count = 0
    skipped_samples: tuple[tuple[Count, Count], ...] = ()  # [first, stop) of batches that a rollback leaves out
    recent: tuple[tuple[float, float], ...] = ()  # loss and gradient norm of the last steps, oldest first


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands. Order of data and dropout follow from ``seed`` and ``samples``: no RNG state."""

    step: Count  # finished optimizer steps, skipped ones included
    samples: Count  # consumed, over all ranks: the position in the order of the data
    tokens: Count  # target tokens trained on
    updates: Count  # applied optimizer steps: AdamW's own count
    loss_scale: Positive | None  # None: the precision has none
    loss_scale_good_steps: Count
    seed: Count
    data_sha256: str | None = None  # of the data set's manifest
    guard: GuardState = field(default_factory=GuardState)


@dataclass(frozen=True)
class StateFile:
    """All of ``state.json``; there the training state's keys stand beside the others."""

    training: TrainingState
    config: dict[str, Any]  # resolved
    world_size: Annotated[int, Field(ge=1)]  # that wrote the checkpoint
    versions: dict[str, str]
    launch_id: str | None = None  # of the launcher's start that wrote it

    def to_json(self) -> dict[str, Any]:
        """What is written."""
        return {**asdict(self.training), **{key: getattr(self, key) for key in _BESIDE_TRAINING}}


_BESIDE_TRAINING = ("world_size", "launch_id", "versions", "config")
_STATE_FILE_SCHEMA = TypeAdapter(StateFile)


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Finished checkpoint folders of a run, oldest first. Nothing is verified."""
    parent = run_folder / CHECKPOINTS_FOLDER
    if not parent.is_dir():
        return []
    return sorted((folder for folder in parent.iterdir() if _STEP_FOLDER.fullmatch(folder.name)), key=step_of)


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands, or will stand."""
    return run_folder / CHECKPOINTS_FOLDER / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint folder's name says."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def pieces_file(rank: int, part: str) -> str:
    """The name of one rank's file of ``weights`` or ``moments``."""
    return f"rank_{rank:05d}_{part}.safetensors"


def part_of_file(name: str) -> tuple[int, str] | None:
    """The rank and the part (``weights`` or ``moments``) that a file name says; None: another file."""
    match = _PIECES_FILE.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked as far as other code relies on it.

    Raises:
        CheckpointError: missing, damaged, another version, a file name that leaves the folder or that no
            checkpoint has.
    """
    path = folder / MANIFEST_FILE
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link, which may leave the folder; expected a file")
    manifest = _read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise CheckpointError(f"{path}: format version {found!r}, this program reads {FORMAT_VERSION}")
    if manifest.pop("sha256", None) != sha256_of_json(manifest):
        raise CheckpointError(f"{path}: contents changed (its own SHA-256 differs)")
    try:
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"{path}: the file name {name!r} leaves the folder")
            if name != STATE_FILE and part_of_file(name) is None:
                raise CheckpointError(f"{path}: {name!r} is no file of a checkpoint")
            if not isinstance(entry["bytes"], int) or not _SHA256.fullmatch(entry["sha256"]):
                raise ValueError(f"{name}: expected its size and SHA-256")
        for shape in manifest["parameters"].values():
            if not all(isinstance(size, int) and size > 0 for size in shape) or math.prod(shape) > _MOST_ELEMENTS:
                raise ValueError(f"{shape} is no shape")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: malformed ({error})") from None
    if STATE_FILE not in manifest["files"]:
        raise CheckpointError(f"{path}: malformed (does not name {STATE_FILE})")
    return manifest


def config_section(content: dict[str, Any], key: str) -> dict[str, Any]:
    """A part of a stored config, which another program may have written; empty where it holds something else."""
    section = content.get(key)
    return section if isinstance(section, dict) else {}


def bytes_of_tensors(folder: Path) -> int:
    """The size of all ranks' tensors, as the manifest says.

    Raises:
        CheckpointError: the manifest cannot be used.
    """
    files = read_manifest(folder)["files"]
    return sum(entry["bytes"] for name, entry in files.items() if part_of_file(name))


def read_state_file(folder: Path) -> StateFile:
    """All that ``state.json`` says.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    path = folder / STATE_FILE
    content = _read_json(path)
    beside = {key: content.pop(key) for key in _BESIDE_TRAINING if key in content}
    try:
        # As JSON, where a list is what a tuple was.
        return _STATE_FILE_SCHEMA.validate_json(json.dumps({"training": content, **beside}), strict=True)
    except ValidationError as error:
        mistake = error.errors()[0]
        key = ".".join(map(str, mistake["loc"]))
        raise CheckpointError(f"{path}: malformed ({key}: {mistake['msg']})") from None


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Where the run stood, and its resolved config.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    content = read_state_file(folder)
    return content.training, content.config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content

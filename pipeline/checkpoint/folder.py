"""A checkpoint folder on disk: names, manifest, state, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_tools.storage import sha256_of_file
from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
CHECKPOINTS_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands. Order of data and dropout follow from ``seed`` and ``samples``: no RNG state."""

    step: int  # finished optimizer steps, skipped ones included
    samples: int  # consumed, over all ranks
    tokens: int  # target tokens consumed
    updates: int  # applied optimizer steps: AdamW's own count
    loss_scale: float
    loss_scale_good_steps: int
    seed: int


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Finished checkpoint folders of a run, oldest first. Nothing is verified."""
    parent = run_folder / CHECKPOINTS_FOLDER
    if not parent.is_dir():
        return []
    return sorted((folder for folder in parent.iterdir() if _STEP_FOLDER.fullmatch(folder.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint folder's name says."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def newest_good_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named in the log and passed over."""
    for folder in reversed(list_checkpoints(run_folder)):
        problem = find_damage(folder)
        if problem is None:
            return folder
        log.warning("skipping a damaged checkpoint: %s", problem)
    return None


def locate_checkpoint(path: Path) -> Path:
    """A checkpoint folder from a path to one, or to a run folder (its newest good one).

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (path / MANIFEST_FILE).is_file():
        if problem := find_damage(path):
            raise CheckpointError(f"{problem}; give another checkpoint, or the run folder for its newest good one")
        return path
    folder = newest_good_checkpoint(path)
    if folder is None:
        raise CheckpointError(
            f"{path}: no checkpoint here; expected a run folder with {CHECKPOINTS_FOLDER}/, "
            f"or a checkpoint folder with {MANIFEST_FILE}"
        )
    return folder


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in one line; None when every file has its size and hash."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path}: {path.stat().st_size} bytes, expected {entry['bytes']}"
        if sha256_of_file(path) != entry["sha256"]:
            return f"{path}: contents changed (SHA-256 differs from the manifest)"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked as far as other code relies on it.

    Raises:
        CheckpointError: missing, damaged, another version, or a file name that leaves the folder.
    """
    manifest = _read_json(folder / MANIFEST_FILE)
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise CheckpointError(
            f"{folder / MANIFEST_FILE}: format version {found!r}, this program reads {FORMAT_VERSION}"
        )
    if manifest.pop("sha256", None) != hash_of_json(manifest):
        raise CheckpointError(f"{folder / MANIFEST_FILE}: contents changed (its own SHA-256 differs)")
    try:
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder / MANIFEST_FILE}: the file name {name!r} leaves the folder")
            int(entry["bytes"]), str(entry["sha256"])
        for shape in manifest["parameters"].values():
            torch.Size(shape)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST_FILE}: malformed ({error})") from None
    return manifest


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Where the run stood, and its resolved config.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    content = _read_json(folder / STATE_FILE)
    try:
        config = content.pop("config")
        content.pop("versions")
        return TrainingState(**content), config
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE}: malformed ({error})") from None


def hash_of_json(value: dict[str, Any]) -> str:
    """SHA-256 of a JSON object in the order of its keys, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content

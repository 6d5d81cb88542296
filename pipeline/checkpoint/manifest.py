"""Define and read ``manifest.json``, which lists the parameters and the files of a checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError

from data_tools.storage.json_values import sha256_of_json
from pipeline.checkpoint.json_files import malformed_error, read_json_object
from pipeline.checkpoint.layout import MANIFEST_FILE, STATE_FILE, group_of, parse_tensor_file
from pipeline.errors import CheckpointError
from pipeline.model.parameter_state import ADAMW_STATE, KINDS_OF_WEIGHTS, WEIGHT

FORMAT_VERSION = 2
#: Version 1 has no ``optimizer_state`` in the manifest, because every parameter has AdamW's two moments.
READABLE_VERSIONS = (1, 2)
_MAX_ELEMENTS = 1 << 48

Shape = list[Annotated[StrictInt, Field(gt=0)]]
StateName = Annotated[StrictStr, Field(pattern="^[a-z][a-z0-9_]*$")]


@dataclass(frozen=True)
class FileEntry:
    """What a checkpoint's manifest says about one of its files."""

    bytes: Annotated[StrictInt, Field(ge=0)]
    sha256: Annotated[StrictStr, Field(pattern="^[0-9a-f]{64}$")]
    finite: StrictBool | None = None  # whether all numbers are finite; None if unknown, or for a file without tensors

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON values, without values that are None."""
        return {key: value for key, value in vars(self).items() if value is not None}


Files = Mapping[str, FileEntry]  # file name -> entry in the manifest


@dataclass(frozen=True)
class CheckpointManifest:
    """The content of ``manifest.json``.

    Attributes:
        parameters: the shapes of all parameters, by canonical name.
        optimizer_state: the names of each parameter's optimizer tensors.
        files: the entries of all other files of the checkpoint, by file name.
    """

    parameters: dict[str, Shape]
    optimizer_state: dict[str, list[StateName]]
    files: dict[str, FileEntry]

    @property
    def tensor_bytes(self) -> int:
        """Return the size of all tensor files in bytes."""
        return sum(entry.bytes for name, entry in self.files.items() if parse_tensor_file(name))

    def weights_sha256(self, weights: str = "training") -> str:
        """Return a SHA-256 that identifies the weights: the hash of the hashes of their files.

        Args:
            weights: ``training`` for the trained weights, or ``ema`` for their moving average.
        """
        group = group_of(KINDS_OF_WEIGHTS[weights])
        parsed = ((parse_tensor_file(name), name, entry.sha256) for name, entry in self.files.items())
        return sha256_of_json({name: sha256 for found, name, sha256 in parsed if found and found[1] == group})

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values. The last value is a SHA-256 of all values before it."""
        content = {
            "format_version": FORMAT_VERSION,
            "parameters": self.parameters,
            "optimizer_state": self.optimizer_state,
            "files": {name: entry.to_json() for name, entry in self.files.items()},
        }
        return {**content, "sha256": sha256_of_json(content)}


_SCHEMA = TypeAdapter(CheckpointManifest)


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read and check the manifest of a checkpoint folder.

    Raises:
        CheckpointError: the manifest is missing, is damaged, or has an unknown format version.
    """
    path = folder / MANIFEST_FILE
    if os.path.islink(path):  # not Path.is_symlink(), which raises an error if the folder cannot be read
        raise CheckpointError(f"{path}: is a link, which may point outside the folder; expected a file")
    return check_manifest(read_json_object(path), path)


def find_not_finite(files: Files) -> str | None:
    """Return a message if a manifest says that a file contains NaN or infinite numbers. Otherwise, return None.

    No run can resume from such a checkpoint.

    Args:
        files: the entries in the manifest, by file name.
    """
    names = [name for name, entry in files.items() if entry.finite is False]
    more = f" (and {len(names) - 1} more files)" if len(names) > 1 else ""
    return f"{names[0]} contains NaN or infinite numbers{more}" if names else None


def check_manifest(content: dict[str, Any], path: Path | str) -> CheckpointManifest:
    """Check the content of a ``manifest.json``.

    Raises:
        CheckpointError: the manifest is damaged or has an unknown format version. The message begins with ``path``.
    """
    if "shards" in content:
        raise CheckpointError(f"{path}: is the manifest of token shards, not of a checkpoint")
    if (found := content.get("format_version")) not in READABLE_VERSIONS:
        raise CheckpointError(f"{path}: format version {found!r}, this program reads {describe_readable_versions()}")
    if content.get("sha256") != sha256_of_json({key: value for key, value in content.items() if key != "sha256"}):
        raise CheckpointError(f"{path}: contents changed (its own SHA-256 differs)")
    if found == 1 and isinstance(names := content.get("parameters"), dict):
        content = {**content, "optimizer_state": dict.fromkeys(names, list(ADAMW_STATE))}
    try:
        manifest = _SCHEMA.validate_python(content)
    except ValidationError as error:
        raise malformed_error(path, error) from None
    if problem := _find_contradiction(manifest):
        raise CheckpointError(f"{path}: {problem}")
    return manifest


def _find_contradiction(manifest: CheckpointManifest) -> str | None:
    """Return the first problem of the values in a manifest whose types are right, or None."""
    for name in manifest.files:
        if Path(name).name != name:
            return f"the file name {name!r} points outside the folder"
        if name != STATE_FILE and parse_tensor_file(name) is None:
            return f"{name!r} is not a file of a checkpoint"
    if STATE_FILE not in manifest.files:
        return f"malformed (does not name {STATE_FILE})"
    for name, shape in manifest.parameters.items():
        if math.prod(shape) > _MAX_ELEMENTS:
            return f"malformed (parameters.{name}: {shape} has more than {_MAX_ELEMENTS} elements)"
    if manifest.optimizer_state.keys() != manifest.parameters.keys():
        return "malformed (optimizer_state and parameters name different parameters)"
    for name, kinds in manifest.optimizer_state.items():
        if len(set(kinds)) != len(kinds) or WEIGHT in kinds:
            return f"malformed (optimizer_state.{name}: {kinds} must be different names, none of them {WEIGHT!r})"
    return None


def describe_readable_versions() -> str:
    return " and ".join(map(str, READABLE_VERSIONS))

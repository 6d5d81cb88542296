"""Define the names of the files in a checkpoint folder, and read the manifest."""

import json
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools.storage.content import describe_content
from data_tools.storage.files import sha256_of_json
from pipeline.errors import CheckpointError
from pipeline.model.parameter_state import ADAMW_STATE, WEIGHT
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER, CONFIG_FILE

FORMAT_VERSION = 2
#: Version 1 has no ``optimizer_state`` in the manifest, because every parameter has AdamW's two moments.
READABLE_VERSIONS = (1, 2)
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_CHECKPOINT_URL = re.compile(rf"(?P<run>.+)/{CHECKPOINTS_FOLDER}/(?P<name>step_\d{{8,}})/?")
_TENSOR_FILE = re.compile(r"rank_(\d{5,})_(weights|moments)\.safetensors")
_MAX_ELEMENTS = 1 << 48
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STATE_NAME = re.compile(r"[a-z][a-z0-9_]*")


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Return the complete checkpoint folders of a run, oldest first. Their files are not verified."""
    parent = run_folder / CHECKPOINTS_FOLDER
    if not parent.is_dir():
        return []
    return sorted((folder for folder in parent.iterdir() if _STEP_FOLDER.fullmatch(folder.name)), key=step_of)


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Return the path of the checkpoint folder of ``step``. The folder need not exist."""
    return run_folder / CHECKPOINTS_FOLDER / f"step_{step:08d}"


def checkpoint_url(run_url: str, step: int) -> str:
    """Return the URL of the checkpoint of ``step``. The checkpoint need not exist."""
    return f"{run_url.rstrip('/')}/{CHECKPOINTS_FOLDER}/step_{step:08d}"


def split_url(url: str) -> tuple[str, int | None]:
    """Split the URL of a checkpoint into the URL of its run and its step. For the URL of a run, the step is None."""
    match = _CHECKPOINT_URL.fullmatch(url)
    return (match["run"], parse_step(match["name"])) if match else (url.rstrip("/"), None)


def checkpoint_of_step(run_folder: Path, step: int) -> Path:
    """Return the checkpoint folder of a step. Raises CheckpointError if the run has no checkpoint of this step."""
    folder = checkpoint_folder(run_folder, step)
    if folder.is_dir():
        return folder
    if is_checkpoint(run_folder):
        raise CheckpointError(
            f"{run_folder}: is the checkpoint of one step; give the run folder that holds it, or leave the step out"
        )
    steps = ", ".join(str(step_of(other)) for other in list_checkpoints(run_folder))
    if not steps:
        raise no_checkpoint_error(run_folder)
    raise CheckpointError(
        f"{run_folder}: no checkpoint of step {step}; it has steps {steps} (checkpoint.keep_every_steps keeps "
        "milestones)"
    )


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint folder. The checkpoint may be damaged.

    A folder of token shards also has a ``manifest.json``, but is not a checkpoint folder.
    """
    return (path / STATE_FILE).is_file() or ((path / MANIFEST_FILE).is_file() and not _holds_shards(path))


def no_checkpoint_error(path: Path | str) -> CheckpointError:
    """Return the error for a path at which no checkpoint was found. The message says what the path is instead."""
    expected = f"expected a run folder with {CHECKPOINTS_FOLDER}/, or a checkpoint folder with {MANIFEST_FILE}"
    if isinstance(path, str):  # a URL
        return CheckpointError(f"{path}: no checkpoint here; {expected}")
    if not path.exists():
        return CheckpointError(f"{path}: no checkpoint here; {expected}, and this path does not exist")
    if path.is_file():
        return CheckpointError(
            f"{path}: no checkpoint here, it is a file; {expected} (gpt2-pipeline checkpoint convert imports files of "
            "nanoGPT)"
        )
    if _holds_shards(path):
        return CheckpointError(f"{path}: no checkpoint here, the folder holds token shards; {expected}")
    if _holds_hugging_face_model(path):
        return CheckpointError(
            f"{path}: no checkpoint here, the folder holds a Hugging Face model; import it with gpt2-pipeline export "
            f"--from-hf {path} --out RUN, and give RUN"
        )
    return CheckpointError(f"{path}: no checkpoint here; {expected}")


def _holds_shards(folder: Path) -> bool:
    with suppress(CheckpointError):
        return "shards" in read_json_object(folder / MANIFEST_FILE)
    return False


def _holds_hugging_face_model(folder: Path) -> bool:
    with suppress(CheckpointError):
        return "model_type" in read_json_object(folder / CONFIG_FILE)
    return False


def step_of(folder: Path) -> int:
    step = parse_step(folder.name)
    assert step is not None, folder
    return step


def tensor_file(rank: int, group: str) -> str:
    """Return the name of a rank's tensor file. ``group`` is ``weights`` or ``moments``."""
    return f"rank_{rank:05d}_{group}.safetensors"


def parse_step(name: str) -> int | None:
    """Return the step in the name of a checkpoint folder, or None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def parse_tensor_file(name: str) -> tuple[int, str] | None:
    """Return (rank, ``weights`` or ``moments``) for the name of a tensor file, or None for any other name."""
    match = _TENSOR_FILE.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check ``manifest.json``. The result has the keys of the newest format version.

    Raises:
        CheckpointError: the manifest is missing, is damaged, or has an unknown format version.
    """
    path = folder / MANIFEST_FILE
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link, which may point outside the folder; expected a file")
    return check_manifest(read_json_object(path), path)


def check_manifest(manifest: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """Check the content of a ``manifest.json``. Return the manifest with the keys of the newest format version.

    Raises:
        CheckpointError: the manifest is damaged or has an unknown format version. The message begins with ``path``.
    """
    if "shards" in manifest:
        raise CheckpointError(f"{path}: is the manifest of token shards, not of a checkpoint")
    if (found := manifest.get("format_version")) not in READABLE_VERSIONS:
        raise CheckpointError(f"{path}: format version {found!r}, this program reads {describe_readable_versions()}")
    if manifest.pop("sha256", None) != sha256_of_json(manifest):
        raise CheckpointError(f"{path}: contents changed (its own SHA-256 differs)")
    try:
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"{path}: the file name {name!r} points outside the folder")
            if name != STATE_FILE and parse_tensor_file(name) is None:
                raise CheckpointError(f"{path}: {name!r} is not a file of a checkpoint")
            if not isinstance(entry["bytes"], int) or not _SHA256.fullmatch(entry["sha256"]):
                raise ValueError(f"{name}: expected its size and SHA-256")
        for shape in manifest["parameters"].values():
            if not all(isinstance(size, int) and size > 0 for size in shape) or math.prod(shape) > _MAX_ELEMENTS:
                raise ValueError(f"{shape} is not a shape")
        if found == 1:
            manifest["optimizer_state"] = dict.fromkeys(manifest["parameters"], list(ADAMW_STATE))
        _check_state_names(manifest["optimizer_state"], manifest["parameters"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: malformed ({error})") from None
    if STATE_FILE not in manifest["files"]:
        raise CheckpointError(f"{path}: malformed (does not name {STATE_FILE})")
    return manifest


def _check_state_names(state_names: dict[str, list[str]], parameters: dict[str, list[int]]) -> None:
    if state_names.keys() != parameters.keys():
        raise ValueError("optimizer_state and parameters name different parameters")
    for name, kinds in state_names.items():
        are_names = isinstance(kinds, list) and all(_STATE_NAME.fullmatch(kind) for kind in kinds)
        if not are_names or len(set(kinds)) != len(kinds) or WEIGHT in kinds:
            raise ValueError(f"optimizer_state of {name}: {kinds} is not a list of names")


def describe_readable_versions() -> str:
    return " and ".join(map(str, READABLE_VERSIONS))


def bytes_of_tensors(folder: Path) -> int:
    """Return the size of all tensor files in bytes. Raises CheckpointError if the manifest cannot be read."""
    files = read_manifest(folder)["files"]
    return sum(entry["bytes"] for name, entry in files.items() if parse_tensor_file(name))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object. Raises CheckpointError if this fails."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {describe_content(path) or f'cannot be read ({error})'}") from None
    return parse_json_object(text, path)


def parse_json_object(text: str | bytes, path: Path | str) -> dict[str, Any]:
    """Parse the text of a JSON object. Raises CheckpointError if this fails. The message begins with ``path``."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {describe_content(path) or f'cannot be read ({error})'}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def size_of_file(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if the file does not exist."""
    with suppress(OSError):
        return path.lstat().st_size
    return 0


def size_of_folder(folder: Path) -> int:
    """Return the total size in bytes of a folder and its subfolders. Files may disappear during the call."""
    return sum(size_of_file(Path(parent, name)) for parent, _, files in os.walk(folder) for name in files)

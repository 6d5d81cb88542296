"""Define the names of checkpoint folders and of their files, and find the checkpoints of a run."""

import os
import re
import shlex
from contextlib import suppress
from pathlib import Path

from pipeline.checkpoint.json_files import read_json_object
from pipeline.errors import CheckpointError
from pipeline.model.parameter_state import WEIGHT
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER, CONFIG_FILE

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
#: Each rank writes one file per group. ``moments`` contains the optimizer's state.
WEIGHTS, MOMENTS = GROUPS = ("weights", "moments")
STEP_PREFIX = "step_"  # of the name of a checkpoint folder
_STEP_FOLDER = re.compile(rf"{STEP_PREFIX}(\d{{8,}})")
_CHECKPOINT_URL = re.compile(rf"(?P<run>.+)/{CHECKPOINTS_FOLDER}/(?P<name>{STEP_PREFIX}\d{{8,}})/?")
_TENSOR_FILE = re.compile(rf"rank_(\d{{5,}})_({'|'.join(GROUPS)})\.safetensors")


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Return the complete checkpoint folders of a run, oldest first. Their files are not verified.

    Raises OSError if the disk fails. Without this error, the run would seem to have no checkpoints.
    """
    parent = run_folder / CHECKPOINTS_FOLDER
    try:
        names = os.listdir(parent)  # not Path.is_dir(), which is False after some failures of the disk
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the path contains a null character
        return []
    return sorted((parent / name for name in names if parse_step(name) is not None), key=step_of)


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint folder of ``step``."""
    return f"{STEP_PREFIX}{step:08d}"


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Return the path of the checkpoint folder of ``step``. The folder need not exist."""
    return run_folder / CHECKPOINTS_FOLDER / checkpoint_name(step)


def checkpoint_url(run_url: str, step: int) -> str:
    """Return the URL of the checkpoint of ``step``. The checkpoint need not exist."""
    return f"{run_url.rstrip('/')}/{CHECKPOINTS_FOLDER}/{checkpoint_name(step)}"


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
            f"--from-hf {shlex.quote(str(path))} --out RUN, and give RUN"
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


def group_of(kind: str) -> str:
    """Return which tensor files store a kind of tensors: ``weights`` or ``moments``.

    A kind is ``weight``, or the name of an optimizer tensor, such as ``exp_avg``.
    """
    return WEIGHTS if kind == WEIGHT else MOMENTS


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


def size_of_file(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if the file does not exist."""
    with suppress(OSError):
        return path.lstat().st_size
    return 0


def size_of_folder(folder: Path) -> int:
    """Return the total size in bytes of a folder and its subfolders. Files may disappear during the call."""
    return sum(size_of_file(Path(parent, name)) for parent, _, files in os.walk(folder) for name in files)

"""A checkpoint made anew in a run folder of its own: as if one rank had saved it, from ours or another program's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_tools.storage.atomic import fsync_file, write_json_durably
from data_tools.storage.files import sha256_of_file
from pipeline.checkpoint.folder import (
    MANIFEST_FILE,
    TrainingState,
    checkpoint_folder,
    list_checkpoints,
    pieces_file,
    read_manifest,
    read_state,
)
from pipeline.checkpoint.pieces import KINDS, WEIGHT, Piece, index_pieces, piece_key
from pipeline.checkpoint.retention import aside_path
from pipeline.checkpoint.saving import (
    Files,
    SaveAttempt,
    SavedCheckpoint,
    make_room,
    publish_checkpoint,
    write_metadata,
)
from pipeline.checkpoint.snapshot import Snapshot
from pipeline.checkpoint.tensor_stream import StreamedTensor, write_tensors
from pipeline.checkpoint.verification import locate_checkpoint
from pipeline.config.loading import config_from_json, dump_config
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.interop.foreign import ForeignCheckpoint, Parts
from pipeline.interop.nanogpt import read_nanogpt
from pipeline.run_folder.layout import CONFIG_FILE
from pipeline.run_folder.lock import lock_run_folder

_ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@dataclass(frozen=True)
class Conversion:
    """What was written, and what a person should know of it."""

    saved: SavedCheckpoint
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([str(self.saved), *self.notes])


def convert(source: Path, run_folder: Path) -> Conversion:
    """Write a checkpoint into a run folder that has none, with the run's ``config.json``.

    Args:
        source: a checkpoint or run folder of ours, or the ``ckpt.pt`` of nanoGPT.
        run_folder: is made where it does not exist, and held meanwhile.

    Raises:
        CheckpointError: the source cannot be used, the folder has checkpoints, or writing failed; nothing
            half-written is left.
        ConfigError: the source's config is none of this program's, or a run is using the folder.
    """
    expect_unused(run_folder)
    if source.is_file():
        return write_foreign(read_nanogpt(source, run_folder), run_folder)
    return _convert_own(source, run_folder)


def write_foreign(found: ForeignCheckpoint, run_folder: Path) -> Conversion:
    """Make a run folder of another program's checkpoint; raises as ``convert``."""
    with _occupied(run_folder, found.config):
        saved = _save(run_folder, found.state, found.shapes, dump_config(found.config), found.parts)
    return Conversion(saved, found.notes)


def _convert_own(source: Path, run_folder: Path) -> Conversion:
    """The state and the config in the checkpoint stay as they are; ``config.json`` names the new folder."""
    folder = locate_checkpoint(source)
    manifest = read_manifest(folder)
    state, stored = read_state(folder)
    config = config_from_json(stored, origin=str(folder / "state.json"))
    config = config.model_copy(update={"run": config.run.model_copy(update={"out_dir": str(run_folder)})})
    pieces, shapes = index_pieces(folder, manifest), manifest["parameters"]
    kinds = {"weights": [WEIGHT], "moments": [kind for kind in KINDS if kind != WEIGHT]}
    parts = {
        part: {
            piece_key(kind, name, None): _streamed(shape, pieces[kind][name])
            for kind in kinds[part]
            for name, shape in shapes.items()
        }
        for part in kinds
    }
    with _occupied(run_folder, config):
        return Conversion(_save(run_folder, state, shapes, stored, parts), [])


def _save(
    run_folder: Path, state: TrainingState, shapes: dict[str, list[int]], stored: dict[str, Any], parts: Parts
) -> SavedCheckpoint:
    """Write a checkpoint tensor by tensor; ``stored`` is its config."""
    started = time.perf_counter()
    target = checkpoint_folder(run_folder, state.step)
    aside = aside_path(target)
    attempt = SaveAttempt(_ALONE, aside)
    attempt.on_main(lambda: make_room(aside))
    files = attempt.on_all(lambda: _write_parts(aside, parts))
    attempt.on_main(lambda: write_metadata(aside, Snapshot(state, shapes, {}), stored, _ALONE.size, files))
    attempt.on_main(lambda: publish_checkpoint(aside, target))
    written = sum(entry["bytes"] for entry in files.values())
    return SavedCheckpoint(target, {_ALONE.rank: written}, time.perf_counter() - started)


def expect_unused(run_folder: Path) -> None:
    """A new run needs a folder without checkpoints; raises ``CheckpointError`` if this is none."""
    if run_folder.exists() and not run_folder.is_dir() or (run_folder / MANIFEST_FILE).exists():
        raise CheckpointError(f"--out: {run_folder} is no run folder; name a folder for the new run")
    if there := list_checkpoints(run_folder):
        raise CheckpointError(f"--out: {run_folder} already has checkpoints ({there[-1].name}); name another folder")


@contextmanager
def _occupied(run_folder: Path, config: Config) -> Iterator[None]:
    """Hold the new run's folder, in which ``config.json`` then stands."""
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--out: cannot make {run_folder} ({error.strerror}); name another folder") from None
    with lock_run_folder(run_folder):
        expect_unused(run_folder)
        write_json_durably(run_folder / CONFIG_FILE, dump_config(config))
        yield


def _write_parts(aside: Path, parts: Parts) -> Files:
    """The two files of a single rank, durable and read back; returns their manifest entries."""
    files = {}
    for part, tensors in parts.items():
        path = aside / pieces_file(_ALONE.rank, part)
        digest = write_tensors(path, dict(sorted(tensors.items())))
        fsync_file(path)
        if sha256_of_file(path) != digest:
            raise CheckpointError(f"{path.name}: was not written as it should be")
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return files


def _streamed(shape: list[int], pieces: list[Piece]) -> StreamedTensor:
    """A parameter put together from its pieces, one in memory at a time."""
    return StreamedTensor(shape, torch.float32, lambda: map(_read_piece, pieces))


def _read_piece(piece: Piece) -> Tensor:
    """Its elements, mapped from the file."""
    try:
        with safe_open(piece.file, framework="pt") as file:
            return file.get_tensor(piece.key)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{piece.file}: cannot be read ({error})") from None

"""Measure the checkpoint of many ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.checkpoint.layout import GROUPS, MANIFEST_FILE, MOMENTS, WEIGHTS, checkpoint_folder, tensor_file
from pipeline.checkpoint.manifest import FileEntry, read_manifest
from pipeline.checkpoint.pieces import index_pieces, piece_key
from pipeline.checkpoint.retention import delete_checkpoint
from pipeline.checkpoint.saving import Snapshot, complete_and_publish, write_tensor_files
from pipeline.checkpoint.state import StateFile, TrainingState
from pipeline.checkpoint.tensor_stream import TensorGroups, in_memory
from pipeline.checkpoint.verification import find_damage
from pipeline.config.loading import config_from_json
from pipeline.model.gpt2 import allocate_model
from pipeline.model.parameter_state import ADAMW_STATE, WEIGHT

MIB = 1 << 20


def shapes_of(preset: str) -> dict[str, list[int]]:
    model = allocate_model(config_from_json({"model": {"preset": preset}}, origin="benchmark").model, "meta")
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def measure_checkpoint(ranks: int, folder: Path, shapes: dict[str, list[int]]) -> Iterator[tuple[str, str]]:
    """Yield (name, value with its unit) for each measurement. Each rank saves its FSDP2 shard."""
    state_names = {name: list(ADAMW_STATE) for name in shapes}
    target = checkpoint_folder(folder, 1)
    aside = target.with_name("aside")
    aside.mkdir(parents=True)
    clock = Stopwatch()
    start = TrainingState(step=1, samples=0, tokens=0, updates=1, loss_scale=1.0, loss_scale_good_steps=0, seed=0)

    files: dict[str, FileEntry] = {}
    pieces = 0
    for rank in range(ranks):
        groups = groups_of(rank, ranks, shapes)
        pieces += sum(map(len, groups.values()))
        snapshot = Snapshot(start, shapes, state_names, groups)
        with clock.measuring("write"):
            files |= write_tensor_files(aside, snapshot, rank)
    state = StateFile(**vars(start), world_size=ranks, launch_id=None, versions={}, config={})
    with clock.measuring("publish"):
        complete_and_publish(aside, target, state, snapshot, files)
    yield f"checkpoint: pieces, in {len(files):,} files", f"{pieces:,}"
    yield "checkpoint: a rank writes and reads back its two files", f"{1e3 * clock.seconds['write'] / ranks:.1f} ms"
    yield "checkpoint: rank 0 writes and checks the manifest", f"{clock.seconds['publish']:.1f} s"
    yield "checkpoint: size of the manifest", f"{(target / MANIFEST_FILE).stat().st_size / MIB:.1f} MiB"

    with clock.measuring("manifest"):
        manifest = read_manifest(target)
    yield "checkpoint: a rank reads the manifest", f"{1e3 * clock.seconds['manifest']:.0f} ms"
    with clock.measuring("all"):
        index_pieces(target, manifest)
    yield "checkpoint: a rank reads the headers of all files", f"{clock.seconds['all']:.1f} s"
    own = [tensor_file(ranks // 2, group) for group in GROUPS]
    with clock.measuring("own"):
        index_pieces(target, manifest, own)
    yield "checkpoint: a rank reads the headers of its own files", f"{1e3 * clock.seconds['own']:.1f} ms"
    with clock.measuring("verify"):
        problem = find_damage(target)
    assert problem is None, problem
    yield "checkpoint: rank 0 verifies all files", f"{clock.seconds['verify']:.1f} s"
    with clock.measuring("delete"):
        delete_checkpoint(target)
    yield "checkpoint: rank 0 deletes all files", f"{clock.seconds['delete']:.1f} s"


def groups_of(rank: int, ranks: int, shapes: dict[str, list[int]]) -> TensorGroups:
    """Return the weights and moments of one rank: its rows of each parameter, as FSDP2 divides them."""
    groups: TensorGroups = {group: {} for group in GROUPS}
    for name, shape in shapes.items():
        rows = -(-shape[0] // ranks)
        first, last = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
        if first == last:
            continue
        width = torch.Size(shape[1:]).numel()
        elements = None if ranks == 1 else (first * width, last * width)
        tensor = torch.zeros(shape if elements is None else [(last - first) * width])
        for kind in (WEIGHT, *ADAMW_STATE):
            group = WEIGHTS if kind == WEIGHT else MOMENTS
            groups[group][piece_key(kind, name, elements)] = in_memory(tensor)
    return groups


class Stopwatch:
    """Adds up seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

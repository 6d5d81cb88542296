"""What a checkpoint or a run folder holds, and whether it is whole. Nothing is changed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.folder import (
    MANIFEST_FILE,
    STATE_FILE,
    config_section,
    list_checkpoints,
    part_of_file,
    read_manifest,
    read_state_file,
)
from pipeline.checkpoint.retention import list_abandoned, list_leftovers
from pipeline.checkpoint.verification import find_damage, nothing_here
from pipeline.errors import CheckpointError

_MOST_RANKS_SHOWN = 8
_MODEL_SIZES = ("preset", "n_layer", "n_head", "n_embd", "context_length", "vocab_size")


@dataclass(frozen=True)
class RankSpace:
    """Bytes that one rank wrote."""

    rank: int
    weights: int
    moments: int


@dataclass(frozen=True)
class Contents:
    """What the JSON files of a checkpoint say, and what its files take on the disk."""

    step: int
    samples: int
    tokens: int
    updates: int
    loss_scale: float | None
    skipped_samples: tuple[tuple[int, int], ...]  # [first, stop) of batches that rollbacks left out
    rollbacks: int
    precision: str
    backend: str
    world_size: int  # that wrote it
    model: dict[str, Any]  # preset and sizes
    parameters: int  # the tied weight once, without padding rows
    versions: dict[str, str]
    ranks: list[RankSpace]
    state_bytes: int  # the JSON files


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint at a glance: nothing is hashed."""

    path: Path
    bytes: int
    problem: str | None  # a file that is missing or of another size, or JSON that cannot be read
    contents: Contents | None  # None: the JSON cannot be read

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        rows = [*_content_rows(self.contents)] if self.contents else []
        rows += [("total", readable_size(self.bytes)), ("files", self.problem or "all there, of the right sizes")]
        return "\n".join([str(self.path), *(f"  {label:<11}{text}" for label, text in rows)])


@dataclass(frozen=True)
class RunReport:
    """All checkpoints of a run, oldest first, and what is beside them."""

    path: Path
    checkpoints: list[CheckpointReport]
    leftovers: list[Path]  # of interrupted saves and deletions
    abandoned: list[Path]  # set aside when the run went back

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        beside = {"leftovers": self.leftovers, "abandoned": self.abandoned}
        return {
            "path": str(self.path),
            "checkpoints": [report.to_json() for report in self.checkpoints],
            **{
                kind: [{"path": str(folder), "bytes": size_on_disk(folder)} for folder in folders]
                for kind, folders in beside.items()
            },
        }

    def __str__(self) -> str:
        total = sum(report.bytes for report in self.checkpoints)
        lines = [f"{self.path}: checkpoints {len(self.checkpoints)}, {readable_size(total)}"]
        if self.checkpoints:
            lines.append(f"  {'checkpoint':<24}{'size':>10}  {'ranks':>5}  {'backend':<20}files")
        lines += [_table_row(report) for report in self.checkpoints]
        for what, folders in (
            ("left by an interrupted save or deletion", self.leftovers),
            ("set aside when the run went back", self.abandoned),
        ):
            lines += [f"  {folder.name:<24}{readable_size(size_on_disk(folder)):>10}  {what}" for folder in folders]
        return "\n".join(lines)


def inspect(path: Path) -> CheckpointReport | RunReport:
    """What stands in a checkpoint folder, or in a run folder.

    Raises:
        CheckpointError: it is neither, or the checkpoint's JSON cannot be read.
    """
    if is_checkpoint(path):
        report = _report(path)
        if report.contents is None:
            raise CheckpointError(f"{report.problem}; give another checkpoint")
        return report
    run = RunReport(
        path, [_report(folder) for folder in list_checkpoints(path)], list_leftovers(path), list_abandoned(path)
    )
    if not (run.checkpoints or run.leftovers or run.abandoned):
        raise nothing_here(path)
    return run


def verify_checkpoints(path: Path, say: Callable[[str], None]) -> None:
    """Hash a checkpoint, or all of a run, oldest first; a line each, then the speed.

    Args:
        say: is given each line when it is known.

    Raises:
        CheckpointError: there is none, or some are damaged.
    """
    folders = [path] if is_checkpoint(path) else list_checkpoints(path)
    if not folders:
        raise nothing_here(path)
    started, hashed, damaged = time.perf_counter(), 0, 0
    for folder in folders:
        problem = find_damage(folder)
        hashed += size_on_disk(folder)
        damaged += problem is not None
        say(f"damaged  {problem}" if problem else f"ok       {folder}")
    seconds = time.perf_counter() - started
    say(f"read {readable_size(hashed)} in {seconds:.2f} s, {hashed / seconds / 1e6:,.0f} MB/s")
    if damaged:
        raise CheckpointError(
            f"{path}: damaged checkpoints: {damaged} of {len(folders)}; continue from a good one, "
            "--resume auto passes over damaged ones"
        )


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, if a damaged one, and no run folder."""
    return any((path / name).is_file() for name in (MANIFEST_FILE, STATE_FILE))


def size_on_disk(folder: Path) -> int:
    """Bytes of all files below a folder; what goes away meanwhile counts nothing."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            total += _size(Path(parent, name))
    return total


def readable_size(size: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _report(folder: Path) -> CheckpointReport:
    problem, contents = None, None
    try:
        manifest = read_manifest(folder)
        contents = _read_contents(folder, manifest)
        problem = _find_wrong_size(folder, manifest["files"])
    except CheckpointError as error:
        problem = str(error)
    return CheckpointReport(folder, size_on_disk(folder), problem, contents)


def _read_contents(folder: Path, manifest: dict[str, Any]) -> Contents:
    state = read_state_file(folder)
    training, model = state.training, config_section(state.config, "model")
    return Contents(
        training.step,
        training.samples,
        training.tokens,
        training.updates,
        training.loss_scale,
        training.guard.skipped_samples,
        training.guard.rollbacks,
        str(config_section(state.config, "run").get("precision", "unknown")),
        _backend_name(config_section(state.config, "backend")),
        state.world_size,
        {key: model[key] for key in _MODEL_SIZES if key in model},
        _count_parameters(manifest["parameters"], model.get("vocab_size")),
        state.versions,
        _space_of_ranks(folder, manifest["files"]),
        sum(_size(folder / name) for name in (STATE_FILE, MANIFEST_FILE)),
    )


def _backend_name(backend: dict[str, Any]) -> str:
    name = str(backend.get("name", "unknown"))
    stage = config_section(config_section(backend, "deepspeed"), "zero_optimization").get("stage")
    return name if stage is None else f"{name} ZeRO-{stage}"


def _count_parameters(shapes: dict[str, list[int]], vocab_size: Any) -> int:
    """As ``pipeline.model.gpt2.parameter_count`` gives it for the config."""
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    if isinstance(vocab_size, int) and "wte.weight" in shapes:
        counts["wte.weight"] = vocab_size * shapes["wte.weight"][-1]
    return sum(counts.values())


def _space_of_ranks(folder: Path, files: dict[str, Any]) -> list[RankSpace]:
    sizes: dict[int, dict[str, int]] = {}
    for name in files:
        if part := part_of_file(name):
            sizes.setdefault(part[0], {"weights": 0, "moments": 0})[part[1]] += _size(folder / name)
    return [RankSpace(rank, **parts) for rank, parts in sorted(sizes.items())]


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.lstat().st_size
    return 0


def _find_wrong_size(folder: Path, files: dict[str, Any]) -> str | None:
    """The first file that is not there or not as long as the manifest says."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if _size(path) != entry["bytes"]:
            return f"{path}: {_size(path)} bytes, expected {entry['bytes']}"
    return None


def _content_rows(contents: Contents) -> Iterator[tuple[str, str]]:
    """Label and text of each line."""
    skipped = contents.step - contents.updates
    yield "step", f"{contents.step:,}" + (f", {skipped:,} of them without an update" if skipped else "")
    yield "updates", f"{contents.updates:,}"
    yield "samples", f"{contents.samples:,}"
    yield "tokens", f"{contents.tokens:,}"
    yield "loss scale", "none" if contents.loss_scale is None else f"{contents.loss_scale:g}"
    if contents.rollbacks:
        left_out = ", ".join(f"{first} to {stop - 1}" for first, stop in contents.skipped_samples)
        yield "rollbacks", f"{contents.rollbacks}, samples left out: {left_out}"
    sizes = ", ".join(f"{key} {value}" for key, value in contents.model.items() if key != "preset")
    yield "model", f"{contents.model.get('preset', 'unknown')}, {contents.parameters:,} parameters ({sizes})"
    yield "precision", contents.precision
    yield "written by", f"{contents.backend}, world size {contents.world_size}"
    yield "versions", ", ".join(f"{package} {version}" for package, version in contents.versions.items())
    yield from _space_rows(contents.ranks)
    yield "state", readable_size(contents.state_bytes)


def _space_rows(ranks: list[RankSpace]) -> Iterator[tuple[str, str]]:
    if len(ranks) <= _MOST_RANKS_SHOWN:
        for space in ranks:
            yield (
                f"rank {space.rank}",
                f"weights {readable_size(space.weights)}, moments {readable_size(space.moments)}",
            )
        return
    parts = {"weights": [space.weights for space in ranks], "moments": [space.moments for space in ranks]}
    yield (
        f"{len(ranks)} ranks",
        ", ".join(
            f"{part} {readable_size(min(sizes))} to {readable_size(max(sizes))} each" for part, sizes in parts.items()
        ),
    )


def _table_row(report: CheckpointReport) -> str:
    contents = report.contents
    world_size, backend = (str(contents.world_size), contents.backend) if contents else ("", "")
    size = readable_size(report.bytes)
    return f"  {report.path.name:<24}{size:>10}  {world_size:>5}  {backend:<20}{report.problem or 'sizes match'}"

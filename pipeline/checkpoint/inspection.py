"""Describe a checkpoint, or all checkpoints of a run, without computing hashes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_tools.formatting import format_size
from data_tools.storage.files import is_remote
from pipeline.checkpoint.layout import (
    GROUPS,
    MANIFEST_FILE,
    STATE_FILE,
    is_checkpoint,
    list_checkpoints,
    no_checkpoint_error,
    parse_tensor_file,
    size_of_file,
    size_of_folder,
)
from pipeline.checkpoint.manifest import CheckpointManifest, find_not_finite, read_manifest
from pipeline.checkpoint.remote_run import ABANDONED_MANIFEST, RemoteRun, parse_url
from pipeline.checkpoint.retention import list_abandoned, list_leftovers
from pipeline.checkpoint.state import StateFile, backend_name, config_section, read_state_file
from pipeline.checkpoint.verification import find_size_damage
from pipeline.config.deepspeed_keys import changes_of_numbers
from pipeline.config.schema import MODEL_SIZES, Config, describe_model
from pipeline.errors import CheckpointError
from pipeline.model.parameter_state import TOKEN_EMBEDDING
from pipeline.run_folder.metrics import DIFFERENT_NUMBERS_KEY, read_metrics

_MAX_RANKS_SHOWN = 8


@dataclass(frozen=True)
class CheckpointReport:
    """The size, the contents and the first problem of a checkpoint."""

    path: Path | str  # a URL is a str
    bytes: int
    problem: str | None  # the first missing file, wrong file size or unreadable JSON file, or NaN
    contents: dict[str, Any] | None  # values from the JSON files, and bytes per rank; None if the JSON is unreadable

    def __str__(self) -> str:
        rows = [*_content_rows(self.contents)] if self.contents else []
        rows += [("total", format_size(self.bytes)), ("files", self.problem or "all there, of the right sizes")]
        return "\n".join([str(self.path), *(f"  {label:<11}{text}" for label, text in rows)])


@dataclass(frozen=True)
class SizedFolder:
    path: Path | str
    bytes: int

    def __str__(self) -> str:
        return f"  {Path(self.path).name:<24}{format_size(self.bytes):>10}"


@dataclass(frozen=True)
class RunReport:
    """A description of all folders in a run's folder ``checkpoints``."""

    path: Path | str
    checkpoints: list[CheckpointReport]  # oldest first
    leftovers: list[SizedFolder]  # incomplete, after interrupted saves, uploads and deletions
    abandoned: list[SizedFolder]  # renamed when the run continued from an earlier checkpoint

    def __str__(self) -> str:
        total = sum(report.bytes for report in self.checkpoints)
        lines = [f"{self.path}: checkpoints {len(self.checkpoints)}, {format_size(total)}"]
        if self.checkpoints:
            lines.append(f"  {'checkpoint':<24}{'size':>10}  {'ranks':>5}  {'backend':<20}files")
        lines += [_table_row(report) for report in self.checkpoints]
        lines += [f"{folder}  left by an interrupted save, upload or deletion" for folder in self.leftovers]
        lines += [f"{folder}  set aside when the run went back" for folder in self.abandoned]
        return "\n".join(lines)


def find_different_numbers(run_folder: Path, step: int, config: Config) -> list[str]:
    """Return the keys of ``backend.deepspeed`` that can make a run's results differ from those of other backends.

    Earlier steps may have used another config, so the keys in the run's metrics up to ``step`` are included.
    """
    rows = (row.get(DIFFERENT_NUMBERS_KEY) for row in read_metrics(run_folder) if row["step"] <= step)
    earlier = [key for keys in rows if isinstance(keys, list) for key in keys]
    return list(dict.fromkeys([*changes_of_numbers(config.backend), *earlier]))


def inspect(path: Path | str) -> CheckpointReport | RunReport:
    """Describe a checkpoint, or all checkpoints of a run. ``path`` may also be a URL.

    Raises:
        CheckpointError: ``path`` has no checkpoints, or is a checkpoint whose JSON files cannot be read.
    """
    if is_remote(str(path)):
        return _inspect_url(str(path))
    path = Path(path)
    if is_checkpoint(path):
        report = _inspect_checkpoint(path)
        if report.contents is None:
            raise CheckpointError(f"{report.problem}; give another checkpoint")
        return report
    checkpoints = [_inspect_checkpoint(folder) for folder in list_checkpoints(path)]
    return _require_content(
        RunReport(path, checkpoints, _with_sizes(list_leftovers(path)), _with_sizes(list_abandoned(path)))
    )


def _require_content(run: RunReport) -> RunReport:
    if not (run.checkpoints or run.leftovers or run.abandoned):
        raise no_checkpoint_error(run.path)
    return run


def _inspect_url(url: str) -> CheckpointReport | RunReport:
    run, step = parse_url(url)
    found = run.list()
    if step is not None:
        if step not in found:
            raise no_checkpoint_error(url)
        report = _inspect_remote(run, step, found[step])
        if report.contents is None:
            raise CheckpointError(f"{report.problem}; give another checkpoint")
        return report
    checkpoints: list[CheckpointReport] = []
    leftovers: list[SizedFolder] = []
    abandoned: list[SizedFolder] = []
    for number, sizes in sorted(found.items()):
        folder = SizedFolder(run.checkpoint_url(number), sum(sizes.values()))
        if MANIFEST_FILE in sizes:
            checkpoints.append(_inspect_remote(run, number, sizes))
        else:
            (abandoned if ABANDONED_MANIFEST in sizes else leftovers).append(folder)
    return _require_content(RunReport(run.url, checkpoints, leftovers, abandoned))


def _inspect_remote(run: RemoteRun, step: int, sizes: Mapping[str, int]) -> CheckpointReport:
    problem, contents = None, None
    try:
        checkpoint = run.open(step, sizes)
        contents = _read_contents(run.read_state(step), checkpoint.manifest, sizes)
        problem = checkpoint.find_size_damage() or find_not_finite(checkpoint.manifest.files)
    except CheckpointError as error:
        problem = str(error)
    return CheckpointReport(run.checkpoint_url(step), sum(sizes.values()), problem, contents)


def _with_sizes(folders: list[Path]) -> list[SizedFolder]:
    return [SizedFolder(folder, size_of_folder(folder)) for folder in folders]


def _inspect_checkpoint(folder: Path) -> CheckpointReport:
    problem, contents = None, None
    try:
        manifest = read_manifest(folder)
        sizes = {name: size_of_file(folder / name) for name in (*manifest.files, MANIFEST_FILE)}
        contents = _read_contents(read_state_file(folder), manifest, sizes)
        problems = (find_size_damage(folder / name, entry) for name, entry in manifest.files.items())
        problem = next(filter(None, problems), None) or find_not_finite(manifest.files)
    except CheckpointError as error:
        problem = str(error)
    return CheckpointReport(folder, size_of_folder(folder), problem, contents)


def _read_contents(state: StateFile, manifest: CheckpointManifest, file_sizes: Mapping[str, int]) -> dict[str, Any]:
    model = config_section(state.config, "model")
    return {
        **{key: getattr(state, key) for key in ("step", "samples", "tokens", "updates", "loss_scale")},
        "skipped_samples": state.guard.skipped_samples,
        "rollbacks": state.guard.rollbacks,
        "averaged_steps": state.averaged_steps,
        "precision": str(config_section(state.config, "run").get("precision", "unknown")),
        "backend": backend_name(state.config),
        "world_size": state.world_size,
        "model": {key: model[key] for key in ("preset", *MODEL_SIZES) if key in model},
        "parameters": _count_parameters(manifest.parameters, model.get("vocab_size")),
        "versions": state.versions,
        "ranks": _sizes_per_rank(manifest.files, file_sizes),
        "state_bytes": sum(file_sizes.get(name, 0) for name in (STATE_FILE, MANIFEST_FILE)),
    }


def _count_parameters(shapes: dict[str, list[int]], vocab_size: Any) -> int:
    """Count the parameters without the padding rows of the embedding. The tied weight counts once."""
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    if isinstance(vocab_size, int) and TOKEN_EMBEDDING in shapes:
        counts[TOKEN_EMBEDDING] = vocab_size * shapes[TOKEN_EMBEDDING][-1]
    return sum(counts.values())


def _sizes_per_rank(files: Iterable[str], file_sizes: Mapping[str, int]) -> list[dict[str, int]]:
    sizes: dict[int, dict[str, int]] = {}
    for name in files:
        if rank_and_group := parse_tensor_file(name):
            rank, group = rank_and_group
            sizes.setdefault(rank, {"rank": rank, **dict.fromkeys(GROUPS, 0)})[group] += file_sizes.get(name, 0)
    return [sizes[rank] for rank in sorted(sizes)]


def _content_rows(contents: dict[str, Any]) -> Iterator[tuple[str, str]]:
    step, without_update = contents["step"], contents["step"] - contents["updates"]
    yield "step", f"{step:,}" + (f", {without_update:,} of them without an update" if without_update else "")
    for key in ("updates", "samples", "tokens"):
        yield key, f"{contents[key]:,}"
    yield "loss scale", "none" if contents["loss_scale"] is None else f"{contents['loss_scale']:g}"
    if contents["rollbacks"]:
        skipped = ", ".join(f"{first} to {stop - 1}" for first, stop in contents["skipped_samples"])
        yield "rollbacks", f"{contents['rollbacks']}, samples left out: {skipped}"
    if mean := _describe_mean(contents):
        yield "weights", mean
    model = contents["model"]
    sizes = ", ".join(f"{key} {value}" for key, value in model.items() if key != "preset")
    name = f"{model['preset']}, " if describe_model(model) == model.get("preset") else ""
    yield "model", f"{name}{contents['parameters']:,} parameters ({sizes})"
    yield "precision", contents["precision"]
    yield "written by", f"{contents['backend']}, world size {contents['world_size']}"
    yield "versions", ", ".join(f"{package} {version}" for package, version in contents["versions"].items())
    yield from _rank_rows(contents["ranks"])
    yield "state", format_size(contents["state_bytes"])


def _rank_rows(ranks: list[dict[str, int]]) -> Iterator[tuple[str, str]]:
    if len(ranks) > _MAX_RANKS_SHOWN:
        columns = {group: [sizes[group] for sizes in ranks] for group in GROUPS}
        ranges = [f"{group} {format_size(min(c))} to {format_size(max(c))} each" for group, c in columns.items()]
        yield f"{len(ranks)} ranks", ", ".join(ranges)
        return
    for sizes in ranks:
        yield f"rank {sizes['rank']}", ", ".join(f"{group} {format_size(sizes[group])}" for group in GROUPS)


def _table_row(report: CheckpointReport) -> str:
    contents = report.contents
    world_size, backend = (contents["world_size"], contents["backend"]) if contents else ("", "")
    size = format_size(report.bytes)
    weights = f", weights: {mean}" if contents and (mean := _describe_mean(contents)) else ""
    files = report.problem or "sizes match"
    return f"  {Path(report.path).name:<24}{size:>10}  {world_size:>5}  {backend:<20}{files}{weights}"


def _describe_mean(contents: dict[str, Any]) -> str:
    return f"mean of steps {', '.join(map(str, steps))}" if (steps := contents["averaged_steps"]) else ""

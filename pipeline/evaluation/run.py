"""Run benchmark tasks on a checkpoint or during training."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import DataError, one_line_write_errors
from data_tools.shards.manifest import VAL_SPLIT, load_manifest
from data_tools.shards.reader import TokenStream, open_split
from data_tools.storage.atomic import write_bytes_durably, write_json_durably
from data_tools.storage.files import is_remote, is_writable, require_writable
from pipeline.backends import Backend
from pipeline.checkpoint.inspection import find_different_numbers
from pipeline.checkpoint.loading import LoadedModel, load_model
from pipeline.config.paths import find_path
from pipeline.config.schema import Config
from pipeline.data.datasets import check_same_vocabulary
from pipeline.data.loader import scored_targets
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.protocols import Figures
from pipeline.evaluation.results import INTERVAL, VALIDATION, Results
from pipeline.evaluation.scoring import Scorer, compute_for_scoring
from pipeline.evaluation.tasks import Prepared, check_tasks, prepare_task
from pipeline.evaluation.validation import mixture_loss, score_split
from pipeline.run_folder.layout import EVALUATION_FOLDER, TENSORBOARD_FOLDER
from pipeline.run_folder.metrics import DIFFERENT_NUMBERS_KEY, TASK_PREFIX, perplexity
from pipeline.run_folder.sinks.service import one_line

log = logging.getLogger(__name__)

ValidationData = tuple[str, TokenStream]  # the folder of token shards, and its validation split


def run_tasks(
    checkpoint: Path | str,
    tasks: Sequence[str],
    settings: Settings,
    world: World,
    *,
    paths: Mapping[str, str] | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    weights: str = "training",
    examples_file: Path | None = None,
    out: Path | None = None,
    show: Callable[[Results], None] = lambda results: None,
) -> tuple[Results, list[Path]]:
    """Score a checkpoint on the given tasks. The main rank shows the results and writes them to files.

    Without ``out``, the results go to the run folder: to JSON files in ``evaluation/`` and to the TensorBoard events.
    If the run folder is not writable or is a URL, the results are only shown.

    Every rank must call this function.

    Args:
        checkpoint: a checkpoint folder or a run folder, or its URL.
        paths: task name -> path of the task's data. For other tasks, the path in the run's ``evaluation.data`` is used.
        batch_size: sequences per forward pass and rank. None means the run's micro-batch size.
        precision: the precision of the forward passes. None means the value of ``run.precision`` in the run's config.
        weights: ``training``, or ``ema`` for the moving average of the weights. With ``ema``, the names of the results
            end with ``_ema``.
        examples_file: a JSONL file for the scores of each example.
        out: the folder for the JSON files. None means the run folder.
        show: is called with the results before they are written.

    Returns:
        The results by name, and the files that this rank has written.

    Raises:
        ConfigError: a task does not exist, or does not support a setting.
        CheckpointError: the checkpoint cannot be used.
        DataError: the data of a task cannot be used.
    """
    if world.device.type == "cpu":
        configure_cpu(world)
    loaded = load_model(checkpoint, world.device, weights)
    config = loaded.config
    if examples_file:
        _check_examples_file(examples_file, tasks)
    folder = None if out is None and is_remote(str(checkpoint)) else _choose_folder(out, loaded.run_folder)
    check_tasks(tasks, settings, paths or {}, config.evaluation.data)
    # Prepare all tasks first, so that errors in the data appear before hours of scoring.
    prepared = _prepare(loaded, tasks, settings, paths or {}, world)
    precision = precision or config.run.precision
    compute = compute_for_scoring(loaded.model, precision, world.device)
    scorer = Scorer(compute, config.model, world, (batch_size or config.batch.micro_batch_size) * config.seq_len)
    suffix = "" if weights == "training" else f"_{weights}"
    results: Results = {}
    examples: list[Figures] = []
    for task, of_task in prepared.items():
        world.progress.reach(f"task {task}")
        figures, scores = of_task.measure(scorer)
        facts = {
            "task": task,
            "checkpoint": str(loaded.checkpoint),
            "step": loaded.step,
            **({"weights": weights} if suffix else {}),
            **({"precision": precision} if task != VALIDATION else {}),
        }
        results[of_task.name + suffix] = {**facts, **figures}
        examples += scores
    world.progress.reach("writing the results", is_patient=True, repeats=False)
    if not world.is_main:
        return results, []
    if keys := find_different_numbers(loaded.run_folder, loaded.step, config):
        results = {name: {**result, DIFFERENT_NUMBERS_KEY: keys} for name, result in results.items()}
    show(results)
    written = _write_results(results, folder) if folder else []
    if folder and out is None:
        _write_events(results, loaded)
    if examples_file:
        _write_examples(examples, examples_file)
        written.append(examples_file)
    return results, written


def _prepare(
    loaded: LoadedModel, tasks: Sequence[str], settings: Settings, given: Mapping[str, str], world: World
) -> dict[str, "Prepared | _PreparedValidation"]:
    """Open the data of each task: the path in ``given``, or else the path in the run's ``evaluation.data``."""
    config, paths = loaded.config, dict(given)
    for task, path in config.evaluation.data.items():
        if task in tasks and task not in given:
            paths[task] = find_path(path, config.run)
    return {
        task: _PreparedValidation(config, _open_validation(loaded, paths.get(task)))
        if task == VALIDATION
        else prepare_task(task, paths.get(task), settings, config.model, world)
        for task in tasks
    }


def _open_validation(loaded: LoadedModel, given: str | None) -> dict[str, ValidationData]:
    """Open the validation split at the path ``given``, or of the run's data if ``given`` is None.

    If the run's data is a mixture and ``given`` is None, return one split per component, by the component's name.
    Components without scored targets are left out. In all other cases, return one split with the name "".

    If a run without a mixture was trained on other data than its folder now holds, log a warning.
    """
    config = loaded.config
    if given is not None or config.data.mixture is None:
        path = find_path(given or config.data.components[0].path, config.run)
        if not load_manifest(path).tokens_of(VAL_SPLIT):
            raise DataError(f"{path} has no split {VAL_SPLIT!r}; name a folder that has one with --data validation=DIR")
        split = path, open_split(path, VAL_SPLIT)
        if not _has_scored_targets(split[1], config.seq_len):
            raise DataError(f"{path}: the split {VAL_SPLIT!r} has no scored target; tokenize more text")
        splits = {"": split}
    else:
        splits = {}
        for component in config.data.mixture:
            path = find_path(component.path, config.run)
            if load_manifest(path).tokens_of(VAL_SPLIT):
                split = path, open_split(path, VAL_SPLIT)
                if _has_scored_targets(split[1], config.seq_len):
                    splits[component.name] = split
        if not splits:
            raise DataError(
                "data.mixture: no component has a validation split with scored targets; "
                "name a dataset that has one with --data validation=DIR"
            )
    for path, stream in splits.values():
        check_same_vocabulary(stream, config.model, path)
    if given is None and config.data.mixture is None:
        _warn_of_other_data(loaded, *splits[""])
    return splits


def _warn_of_other_data(loaded: LoadedModel, path: str, stream: TokenStream) -> None:
    if loaded.data_sha256 not in (None, stream.manifest.content_sha256()):
        log.warning(
            "%s now holds other data than the run was trained on: the validation split may contain documents that the "
            "model has seen, and the loss cannot be compared with the run's",
            path,
        )


def _has_scored_targets(stream: TokenStream, seq_len: int) -> bool:
    return bool(scored_targets(stream, seq_len).any()) if stream.has_mask else stream.tokens > 1


@dataclass(frozen=True)
class _PreparedValidation:
    config: Config
    splits: dict[str, ValidationData]  # from ``_open_validation``
    name: str = VALIDATION

    def measure(self, scorer: Scorer) -> tuple[Figures, list[Figures]]:
        """Score the splits. Return the results, and no examples."""
        seq_len, results = self.config.seq_len, {}
        for name, (path, stream) in self.splits.items():
            result = score_split(scorer.compute, stream, seq_len, scorer.batch_tokens // seq_len, scorer.world)
            results[name] = {"data": path, "data_sha256": stream.manifest.content_sha256(), **result}
        if "" in results:
            return results[""], []
        losses = {name: result["loss"] for name, result in results.items()}
        loss = mixture_loss(losses, {component.name: component.weight for component in self.config.data.components})
        by_name = {f"{name}_loss": value for name, value in losses.items()}
        return {"data": "data.mixture", "loss": loss, "perplexity": perplexity(loss), **by_name, "parts": results}, []


def _check_examples_file(path: Path, tasks: Sequence[str]) -> None:
    """Raise ConfigError if ``path`` cannot be written. This check comes before hours of scoring."""
    if set(tasks) == {VALIDATION}:
        raise ConfigError(f"--save-examples {path}: {VALIDATION} has no examples; leave it out, or name other --tasks")
    if path.is_dir() or not path.parent.is_dir() or not is_writable(path):
        raise ConfigError(
            f"--save-examples {path}: cannot be written; give a file in a folder that exists and that you may write to"
        )


def _choose_folder(out: Path | None, run_folder: Path) -> Path | None:
    """Return the folder for results, or None if the run folder is not writable."""
    folder = out or run_folder / EVALUATION_FOLDER
    if out is not None:
        require_writable(out, "--out")
    if is_writable(folder):
        return folder
    log.warning("%s cannot be written: the results are only printed; --out DIR writes them elsewhere", run_folder)
    return None


def _write_results(results: Results, folder: Path) -> list[Path]:
    with one_line_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for task, result in results.items():
            write_json_durably(folder / f"{task}.json", result)
    return [folder / f"{task}.json" for task in results]


def _write_examples(examples: Sequence[Figures], path: Path) -> None:
    with one_line_write_errors(path):
        write_bytes_durably(path, "".join(json.dumps(example) + "\n" for example in examples).encode())


def _write_events(results: Results, loaded: LoadedModel) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import
    except Exception as error:  # noqa: BLE001 - a damaged package may raise anything
        log.warning("TensorBoard cannot be imported (%s), so only the JSON files have the results", one_line(error))
        return
    with SummaryWriter(str(loaded.run_folder / TENSORBOARD_FOLDER)) as writer:
        for task, result in results.items():
            for key, value in result.items():
                if isinstance(value, float):
                    writer.add_scalar(f"evaluation/{task}_{key}", value, loaded.step)


def prepare_tasks(config: Config, world: World) -> dict[str, Prepared]:
    """Read and encode the examples of the tasks that a run scores during training (``evaluation.tasks``).

    The task ``validation`` is left out. Every rank must call this function.

    Raises:
        ConfigError: the model's vocabulary is not GPT-2's, or a task does not support ``evaluation.max_examples``.
        DataError: the data of a task cannot be used.
    """
    options = config.evaluation
    settings = Settings(limit=options.max_examples)
    paths = {task: find_path(path, config.run) for task, path in options.data.items()}
    return {
        name: prepare_task(name, paths.get(name), settings, config.model, world)
        for name in options.tasks
        if name != VALIDATION
    }


def measure_tasks(
    tasks: Mapping[str, Prepared],
    backend: Backend,
    config: Config,
    world: World,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Measure all tasks during training. Return the results by their keys in ``metrics.jsonl``.

    Every rank must call this function, within ``backend.evaluation_mode()``.

    Args:
        before_batch: is called on every rank before each batch.
    """
    scorer = Scorer(backend, config.model, world, config.batch.micro_batch_size * config.seq_len, before_batch)
    row: dict[str, float] = {}
    for name, task in tasks.items():
        result, _ = task.measure(scorer)
        words = [task.name]
        for key, value in result.items():
            if isinstance(value, float):
                row[f"{TASK_PREFIX}{name}_{key}"] = value
                interval = result.get(key + INTERVAL)
                words.append(f"{key} {value:.4f}" + (" [{:.4f}, {:.4f}]".format(*interval) if interval else ""))
        log.info("%s | %d examples", " | ".join(words), result["examples"])
    return row

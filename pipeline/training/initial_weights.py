"""Set the weights of a new run: random weights, or those of another run or model (``checkpoint.init_from``)."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data_tools.errors import UserError
from data_tools.shards.manifest import TokenizerRecord
from data_tools.storage.files import is_remote
from pipeline.backends import Backend
from pipeline.checkpoint.layout import checkpoint_url, split_url, step_of
from pipeline.checkpoint.verification import log_deletion
from pipeline.checkpoint.weights_copy import was_deleted
from pipeline.config.schema import Config, ModelConfig
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.interop.weights import WeightSource, locate_weights, open_weights
from pipeline.model.parameter_state import POSITION_EMBEDDING

log = logging.getLogger(__name__)

_SIZES = ("n_layer", "n_head", "n_embd", "vocab_size")  # context_length may differ


def find_initial_weights(config: Config) -> Path | str | None:
    """Return the path or URL of a new run's weights, or None if ``checkpoint.init_from`` is null.

    If ``init_from`` is the URL of a run, return the URL of the run's newest good checkpoint. Call this function only on
    the main rank, because it verifies the hashes of all files.

    Raises:
        CheckpointError: the weights are missing or damaged, or do not fit the model.
        ConfigError: the config that is stored with the weights is not valid.
    """
    if config.checkpoint.init_from is None:
        return None
    path = locate_weights(config.checkpoint.init_from)
    _require_same_sizes(open_weights(path), config.model)
    if is_remote(config.checkpoint.init_from):
        return checkpoint_url(split_url(config.checkpoint.init_from)[0], step_of(path))  # a path would differ per host
    return path


def write_initial_weights(
    place: Path | str | None, config: Config, backend: Backend, tokenizer: TokenizerRecord, world: World
) -> dict[str, Any] | None:
    """Set the weights of a new run to the stored weights at ``place``, or to random values if ``place`` is None.

    If another run deletes the stored weights before all ranks have read them, the main rank chooses its newest weights.
    Return the path and the step of the stored weights, or None for random weights. Every rank must call this.

    Args:
        tokenizer: the tokenizer of this run's data.

    Raises:
        CheckpointError: a rank cannot read the weights. All other ranks raise MainRankError.
        DataError: a server refuses or does not answer.
    """
    if place is None:
        backend.draw_weights(config.run.seed)
        return None
    origin = problem = None
    try:
        origin = load_initial_weights(place, backend, tokenizer)
    except UserError as error:  # the other ranks must learn of it
        problem = world.describe_failure(error)
    problems = world.gather(problem)
    if not any(problems):
        return origin
    newest = world.call_on_main(lambda: _find_again(place, config, problems))
    return write_initial_weights(newest, config, backend, tokenizer, world)


def _find_again(place: Path | str, config: Config, problems: list[str | None]) -> Path | str | None:
    """Return the place of other weights if those at ``place`` were deleted. Otherwise, raise CheckpointError."""
    if not was_deleted(place):
        raise CheckpointError(next(filter(None, problems)))
    log_deletion(place)
    return find_initial_weights(config)


def load_initial_weights(place: Path | str, backend: Backend, tokenizer: TokenizerRecord) -> dict[str, Any]:
    """Copy stored weights into a backend. Log which settings of the stored model and the backend's model differ.

    Every rank must call this. Returns the path and the step of the weights.

    Args:
        tokenizer: the tokenizer of this run's data.

    Raises:
        CheckpointError: the weights cannot be read.
        ConfigError: the config that is stored with the weights is not valid.
        DataError: a server refuses or does not answer.
    """
    is_url = is_remote(str(place))
    source: WeightSource | None = None
    failures: list[UserError] = []
    try:
        source = open_weights(locate_weights(place) if is_url else Path(place))  # each host has its own copy of a URL
    except UserError as error:
        failures.append(error)

    def write(name: str, start: int, target: Tensor) -> None:
        try:
            if source and name == POSITION_EMBEDDING:
                copy_positions(source, start, target)
            elif source:
                source.copy_elements(name, start, target)
        except UserError as error:
            failures.append(error)

    backend.write_weights(write)  # also after a failure, because other ranks may wait in this collective call
    if failures:
        raise failures[0]
    assert source is not None
    for note in [*source.notes, *_describe_changes(source.config, backend.model.config)]:
        log.info("weights   %s", note)
    warn_of_other_tokenizer(source.path, source.tokenizer, tokenizer)
    return {"path": str(place) if is_url else str(Path(place).resolve()), "step": source.step}


def warn_of_other_tokenizer(path: Path, stored: TokenizerRecord | None, tokenizer: TokenizerRecord) -> None:
    """Log a warning if the weights at ``path`` were trained on tokens of another tokenizer than this run's data.

    Args:
        stored: the tokenizer of the weights, or None if it is unknown.
        tokenizer: the tokenizer of this run's data.
    """
    if stored and stored.differs_from(tokenizer):
        log.warning(
            "%s: these weights were trained on tokens of the tokenizer %s, and the data of this run was tokenized with "
            "%s: the same id is another text, so the loss begins high, and the model learns its tokens again",
            path,
            stored,
            tokenizer,
        )


def copy_positions(source: WeightSource, start: int, target: Tensor) -> None:
    """Fill ``target``, a range of this run's position embeddings, from the position embeddings of a stored model.

    If the context of this run is shorter than that of the stored model, only the first stored rows are used. If it is
    longer, the r stored rows are repeated: row i is a copy of stored row i mod r (Beltagy et al. 2020, section 5).

    Args:
        start: the first index of the range in this run's flattened position embeddings.
        target: shape (n,).
    """
    stored = source.config.context_length * source.config.n_embd
    copied = 0
    while copied < len(target):
        first = (start + copied) % stored
        count = min(stored - first, len(target) - copied)
        source.copy_elements(POSITION_EMBEDDING, first, target[copied : copied + count])
        copied += count


def _require_same_sizes(source: WeightSource, model: ModelConfig) -> None:
    differing = [key for key in _SIZES if getattr(source.config, key) != getattr(model, key)]
    if differing:
        there, here, cure = compare_sizes(differing, source.config.model_dump(), model)
        raise CheckpointError(
            f"checkpoint.init_from: the weights in {source.path} have {there}, and this run's model has {here}; "
            f"add --set {cure}"
        )


def compare_sizes(keys: Sequence[str], stored: Mapping[str, Any], model: ModelConfig) -> tuple[str, str, str]:
    """Return three texts for an error message about model sizes that differ.

    The texts are, with an example:

    - the sizes of the stored model: ``n_layer 4``;
    - the sizes of this run's model: ``n_layer 2``;
    - the values of ``--set`` that give this run the stored sizes: ``model.n_layer=4``.

    Args:
        keys: the names of the sizes that differ.
    """
    there = ", ".join(f"{key} {stored[key]}" for key in keys)
    here = ", ".join(f"{key} {getattr(model, key)}" for key in keys)
    return there, here, " ".join(f"model.{key}={stored[key]}" for key in keys)


def _describe_changes(source: ModelConfig, model: ModelConfig) -> list[str]:
    notes = []
    there, here = source.context_length, model.context_length
    if here < there:
        notes.append(f"positions: the first {here} of {there} are kept")
    if here > there:
        notes.append(f"positions: {there} there, {here} here; position i starts as position i mod {there}")
    for key in ("reset_positions_at", "dropout"):
        if getattr(source, key) != getattr(model, key):
            notes.append(f"model.{key}: {getattr(source, key)} there, {getattr(model, key)} here")
    return notes

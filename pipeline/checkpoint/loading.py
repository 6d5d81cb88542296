"""Load checkpoints. Each rank reads only the elements that it needs."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import UserError
from data_tools.shards.manifest import TokenizerRecord
from data_tools.storage.files import is_remote
from data_tools.vocabulary import GPT2_VOCAB_SIZE
from pipeline.backends import Backend, Fragment
from pipeline.checkpoint.layout import GROUPS, STATE_FILE, checkpoint_url, split_url, step_of, tensor_file
from pipeline.checkpoint.manifest import CheckpointManifest, read_manifest
from pipeline.checkpoint.pieces import Piece, PieceIndex, index_pieces, manifest_of_weights, open_tensors
from pipeline.checkpoint.state import TrainingState, read_state
from pipeline.checkpoint.verification import find_damage, log_deletion
from pipeline.checkpoint.weights_copy import locate_weights_of, was_deleted
from pipeline.config.loading import config_from_json
from pipeline.config.schema import Config, ModelConfig
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.model.gpt2 import GPT2, allocate_model
from pipeline.model.parameter_state import EMA, KINDS_OF_WEIGHTS, POSITION_EMBEDDING, WEIGHT
from pipeline.run_folder.layout import run_folder_of

log = logging.getLogger(__name__)


def load_training_state(folder: Path, backend: Backend, rank: int | None = None) -> TrainingState:
    """Load a checkpoint into the backend, and return its training state.

    If the checkpoint has the state of another optimizer, this state is not loaded. The optimizer then starts at step
    count 0, and ``optimizer_start`` in the result is the number of earlier updates.

    If the checkpoint lacks the backend's average of the weights, the average starts as a copy of the weights.

    Args:
        rank: the rank whose files are tried first. If these files contain all elements that this process needs, no
            other file is read. If None, the headers of all files are checked.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model. After a read error, the backend may
            contain some of the new values. After other errors, the backend has not changed.
    """
    state = read_training_state(folder, backend, rank)
    finish_loading(backend, state)
    return state


def read_training_state(folder: Path, backend: Backend, rank: int | None = None) -> TrainingState:
    """Do the first half of ``load_training_state``: read the files into the backend. This half uses no collectives.

    If several ranks load a checkpoint, they must all have succeeded before one of them calls ``finish_loading``.
    """
    state, _ = read_state(folder)
    fragments = list(backend.fragments())
    index = _index_for_fragments(folder, backend, fragments, rank)
    stored, kept = _kinds_by_parameter(index), {name: set(kinds) for name, kinds in backend.state_names.items()}
    is_same_optimizer = all(stored[name] - {EMA} == kept[name] - {EMA} for name in kept)
    has_average = all(EMA in kinds for kinds in stored.values())
    _log_average(folder, is_stored=has_average, is_kept=all(EMA in kinds for kinds in kept.values()))
    if not is_same_optimizer:
        log.warning("%s: another optimizer has written this checkpoint; the optimizer's state starts from zero", folder)
        state = replace(state, optimizer_start=state.updates)
    loaded = {kind for kind in index if kind == WEIGHT or (has_average if kind == EMA else is_same_optimizer)}
    tensors = [(fragment, kind, tensor) for fragment in fragments for kind, tensor in fragment.tensors.items()]
    copy_overlaps(
        (tensor, fragment.start, index[kind][fragment.name]) for fragment, kind, tensor in tensors if kind in loaded
    )
    for fragment, kind, tensor in tensors:
        if kind == EMA and not has_average:
            tensor.copy_(fragment.weight)
        elif kind not in loaded:
            tensor.zero_()
    return state


def finish_loading(backend: Backend, state: TrainingState) -> None:
    """Do the second half of ``load_training_state``. Every rank must call this."""
    backend.state_was_loaded(state.updates - state.optimizer_start)
    backend.loss_scaler.restore(state.loss_scale, state.loss_scale_good_steps)


def _index_for_fragments(folder: Path, backend: Backend, fragments: list[Fragment], rank: int | None) -> PieceIndex:
    """Return an index that contains at least the pieces of all fragments of this rank."""
    manifest = read_manifest_of_model(folder, {name: list(shape) for name, shape in backend.parameter_shapes.items()})
    own = [] if rank is None else [tensor_file(rank, group) for group in GROUPS]
    if own and manifest.files.keys() >= set(own):
        index = index_pieces(folder, manifest, own)
        needed = [
            (by_name[each.name], each) for by_name in index.values() for each in fragments if each.name in by_name
        ]
        if all(_has_all(pieces, fragment) for pieces, fragment in needed):
            return index
    return index_pieces(folder, manifest)


def _has_all(pieces: list[Piece], fragment: Fragment) -> bool:
    """Return whether the pieces contain all elements of the fragment. The pieces must not overlap."""
    start, stop = fragment.start, fragment.start + fragment.weight.numel()
    return sum(max(min(piece.stop, stop) - max(piece.start, start), 0) for piece in pieces) == stop - start


def _kinds_by_parameter(index: PieceIndex) -> dict[str, set[str]]:
    """Return the names of the stored optimizer tensors of each parameter."""
    kinds = index.keys() - {WEIGHT}
    return {name: {kind for kind in kinds if name in index[kind]} for name in index[WEIGHT]}


def _log_average(folder: Path, *, is_stored: bool, is_kept: bool) -> None:
    if is_kept and not is_stored:
        log.info("%s: has no average of the weights; the average starts as a copy of the weights", folder)
    if is_stored and not is_kept:
        log.info("%s: the average of the weights is not continued, because averaging.ema is null", folder)


def load_weights(folder: Path, parameters: dict[str, Tensor], weights: str = "training") -> None:
    """Copy the weights of a checkpoint into a model's ``parameters``.

    Args:
        weights: ``training`` for the trained weights, or ``ema`` for their moving average.

    Raises:
        CheckpointError: the checkpoint belongs to another model, lacks the requested moving average, or cannot be read.
    """
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    pieces = pieces_of_weights(folder, shapes, weights)
    with torch.no_grad():
        copy_overlaps((parameter.view(-1), 0, pieces[name]) for name, parameter in parameters.items())


def pieces_of_weights(folder: Path, shapes: dict[str, list[int]], weights: str) -> dict[str, list[Piece]]:
    """Return the stored pieces of each parameter, by names such as ``h.0.attn.c_attn.weight``.

    A piece is a stored range of a parameter's flattened elements.

    Args:
        shapes: the shapes of the model's parameters.
        weights: ``training`` for the trained weights, or ``ema`` for their moving average.

    Raises:
        CheckpointError: the checkpoint is damaged, belongs to another model, or lacks the requested moving average.
    """
    index = index_pieces(folder, manifest_of_weights(read_manifest_of_model(folder, shapes), weights))
    kind = KINDS_OF_WEIGHTS[weights]
    if kind not in index or index[kind].keys() != index[WEIGHT].keys():
        raise CheckpointError(
            f"--weights {weights}: {folder} has no moving average of the weights; leave --weights out, or train with "
            "averaging.ema"
        )
    return index[kind]


def read_parameter(shape: list[int], pieces: list[Piece]) -> Tensor:
    """Read all pieces of a parameter, and return the whole parameter in fp32."""
    parameter = torch.empty(shape)
    copy_overlap(parameter.view(-1), 0, pieces)
    return parameter


def read_manifest_of_model(folder: Path, shapes: dict[str, list[int]]) -> CheckpointManifest:
    """Return the manifest of a checkpoint. Raises CheckpointError if the checkpoint belongs to another model."""
    manifest = read_manifest(folder)
    stored = manifest.parameters
    for name in [*shapes, *stored]:
        if shapes.get(name) != stored.get(name):
            context = ", with --init-from for these weights in another context" if name == POSITION_EMBEDDING else ""
            raise CheckpointError(
                f"{folder}: belongs to another model: {name} has shape {stored.get(name, 'none')} there "
                f"and {shapes.get(name, 'none')} here; use the run's own config, or another run.out_dir{context}"
            )
    return manifest


def copy_overlap(target: Tensor, start: int, pieces: list[Piece]) -> None:
    """Fill ``target`` with a range of a flattened parameter. Only the rows that contain this range are read.

    Args:
        target: shape (n,), on any device.
        start: the index of the range's first element in the flattened parameter.
        pieces: all stored pieces of the parameter.
    """
    copy_overlaps([(target, start, pieces)])


def copy_overlaps(targets: Iterable[tuple[Tensor, int, list[Piece]]]) -> None:
    """Call ``copy_overlap`` for several targets, but open each file only once, because opening parses its header."""
    ranges: dict[Path, list[tuple[Tensor, Piece, int, int]]] = {}
    for target, start, pieces in targets:
        for piece in pieces:
            low, high = max(piece.start, start), min(piece.stop, start + target.numel())
            if low < high:
                overlap = target[low - start : high - start]
                ranges.setdefault(piece.file, []).append((overlap, piece, low, high))
    for path, of_file in ranges.items():
        with open_tensors(path) as file:
            for overlap, piece, low, high in of_file:
                overlap.copy_(_read_elements(file, piece, low, high))


def _read_elements(file: Any, piece: Piece, low: int, high: int) -> Tensor:
    """Return elements ``low`` to ``high - 1`` of a flattened parameter."""
    stored = file.get_slice(piece.key)
    row = torch.Size(stored.get_shape()[1:]).numel()
    low, high = low - piece.start, high - piece.start
    first, last = low // row, -(-high // row)
    elements: Tensor = stored[first:last].reshape(-1)
    return elements[low - first * row : high - first * row]


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with its checkpoint and config."""

    model: GPT2
    config: Config  # the config of the run that trained the model
    checkpoint: Path
    weights_sha256: str  # identifies the weights
    step: int
    data_sha256: str | None  # the hash of the manifest of the training data, or None if unknown
    tokenizer: TokenizerRecord | None  # that made the training data, or None if unknown

    @property
    def run_folder(self) -> Path:
        """Return the folder for evaluation results.

        This is the run folder, or the checkpoint folder if there is no run folder.
        """
        return run_folder_of(self.checkpoint)


def load_model(path: Path | str, device: torch.device | str = "cpu", weights: str = "training") -> LoadedModel:
    """Load a model in fp32 from a checkpoint folder, or from a run folder's newest checkpoint with undamaged weights.

    Args:
        path: the folder, or its URL.
        weights: ``training`` for the trained weights, or ``ema`` for their moving average.

    Raises:
        CheckpointError: there is no checkpoint with undamaged weights, or it lacks the requested moving average.
        ConfigError: the config in the checkpoint is not valid.
        DataError: the server refuses or does not answer.
    """
    return load_model_of_main(path, World.alone(torch.device(device)), weights)


def load_model_of_main(path: Path | str, world: World, weights: str = "training") -> LoadedModel:
    """Load the same model on all ranks: the main rank chooses the checkpoint as ``load_model`` does.

    One rank per host verifies the files, because each host can have its own disk.

    A run that is still training saves new checkpoints and deletes old ones. If each rank chose for itself, the ranks
    could load different checkpoints. If the run deletes the checkpoint before all ranks have read it, the main rank
    chooses again. Every rank must call this.

    Raises:
        CheckpointError: as for ``load_model``, or a rank cannot read the checkpoint, or the hosts have different
            checkpoints at this path.
        ConfigError: the config in the checkpoint is not valid.
        DataError: the server refuses the main rank or does not answer it.
        MainRankError: the main rank has raised one of these errors.
    """
    loaded = None
    while loaded is None:
        loaded = _load_chosen(path, world, weights)
    return loaded


def _load_chosen(path: Path | str, world: World, weights: str) -> LoadedModel | None:
    """Load the checkpoint that the main rank chooses. Return None if it is deleted before all ranks have read it."""
    chosen = world.call_on_main(lambda: locate_weights_of(path, weights))
    loaded = None
    try:
        loaded = _read_model(_locate_chosen(path, chosen, world, weights), world.device, weights)
        own = _Reading(loaded.weights_sha256)
    except UserError as error:  # the other ranks must learn of it
        own = _Reading(problem=world.describe_failure(error))
    readings = world.gather(own)
    return loaded if world.call_on_main(lambda: _is_same_model(path, chosen, readings)) else None


def _locate_chosen(path: Path | str, chosen: Path, world: World, weights: str) -> Path:
    """Return the folder of the chosen checkpoint on this host. One rank per host verifies the files on its disk.

    Args:
        path: what the user named.
        chosen: the folder on the host of the main rank, which has verified it.

    Raises:
        CheckpointError: the checkpoint is damaged on this host, or is no longer at the URL.
        DataError: the server refuses or does not answer.
    """
    if world.is_main:
        return chosen
    if is_remote(str(path)):  # each host has its own copy of the weights at a URL
        return locate_weights_of(checkpoint_url(split_url(str(path))[0], step_of(chosen)), weights)
    if world.local_rank == 0 and (problem := find_damage(chosen, weights=weights)):
        raise CheckpointError(f"{problem}; copy the checkpoint to this host again, or name the URL of the run")
    return chosen


@dataclass(frozen=True)
class _Reading:
    """The hash of the weights that a rank has read, or the reason why it could not read them."""

    weights_sha256: str | None = None
    problem: str | None = None


def _is_same_model(path: Path | str, folder: Path, readings: list[_Reading]) -> bool:
    """Return whether all ranks have read the same weights. If the checkpoint was deleted before, return False.

    Args:
        readings: one per rank.

    Raises:
        CheckpointError: a rank could not read the checkpoint, or has read other weights than rank 0.
        DataError: the server refuses or does not answer.
    """
    places: list[Path | str] = [folder]
    if is_remote(str(path)):  # after a deletion at the URL, the copy in the folder may still exist
        places.append(checkpoint_url(split_url(str(path))[0], step_of(folder)))
    for rank, reading in enumerate(readings):
        if reading.problem and any(map(was_deleted, places)):
            log_deletion(folder)
            return False
        if reading.problem:
            raise CheckpointError(reading.problem)
        if reading != readings[0]:
            raise CheckpointError(
                f"{path}: rank {rank} finds other weights at this path than rank 0; name a folder that all hosts "
                "share, or the URL of the run"
            )
    return True


def _read_model(folder: Path, device: torch.device, weights: str = "training") -> LoadedModel:
    """Load a model in fp32 from a checkpoint folder. The hashes of its files are not verified.

    Raises:
        CheckpointError: a file is missing or malformed, or the checkpoint lacks the requested moving average.
        ConfigError: the config in the checkpoint is not valid.
    """
    state, stored = read_state(folder)
    config = config_from_json(stored, origin=str(folder / STATE_FILE))
    model = allocate_model(config.model, device)
    load_weights(folder, {name: parameter.detach() for name, parameter in model.named_parameters()}, weights)
    model.assert_tied()
    sha256 = read_manifest(folder).weights_sha256(weights)
    return LoadedModel(model.eval(), config, folder, sha256, state.step, state.data_sha256, state.tokenizer)


def load_text_model(path: Path | str, device: torch.device | str, weights: str = "training") -> LoadedModel:
    """Load a model as ``load_model`` does. Raises CheckpointError if the model's vocabulary is not GPT-2's."""
    loaded = load_model(path, device, weights)
    if problem := describe_other_vocabulary(loaded.config.model, loaded.tokenizer):
        raise CheckpointError(
            f"{loaded.checkpoint}: {problem}; text needs a model of GPT-2's vocabulary, {GPT2_VOCAB_SIZE}"
        )
    return loaded


def describe_other_vocabulary(model: ModelConfig, tokenizer: TokenizerRecord | None) -> str | None:
    """Return in which way the vocabulary of a model is not GPT-2's, or None if it is GPT-2's.

    Args:
        tokenizer: the tokenizer of the training data. If it is unknown (None), only the size of the vocabulary counts.
    """
    if model.vocab_size != GPT2_VOCAB_SIZE:
        return f"model.vocab_size is {model.vocab_size}"
    if tokenizer is not None and not tokenizer.is_gpt2:
        return f"the model's tokens are of the tokenizer {tokenizer}"
    return None

"""Open the weights of a checkpoint, of a Hugging Face folder, or of a nanoGPT file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_tools.shards.manifest import TokenizerRecord
from data_tools.storage.files import is_remote
from pipeline.checkpoint.layout import STATE_FILE, is_checkpoint, list_checkpoints
from pipeline.checkpoint.loading import copy_overlap, pieces_of_weights
from pipeline.checkpoint.state import read_state
from pipeline.checkpoint.weights_copy import locate_weights_of
from pipeline.config.loading import config_from_json
from pipeline.config.schema import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.interop.foreign import ForeignModel, model_shapes
from pipeline.interop.hugging_face.importing import has_model, read_folder
from pipeline.interop.nanogpt import read_nanogpt_model


@dataclass(frozen=True)
class WeightSource:
    path: Path  # a checkpoint folder, a Hugging Face folder, or a file
    step: int | None  # the step of the run that wrote the weights; None if the step is not known
    config: ModelConfig
    notes: list[str]  # messages for the user about differences to the model in the files
    tokenizer: TokenizerRecord | None  # that made the data of the model, or None if unknown
    #: (canonical name, start, target): copies a range of a flattened parameter into ``target``, shape (n,). The range
    #: begins at element ``start``. The parameter includes padding rows.
    copy_elements: Callable[[str, int, Tensor], None]


def locate_weights(place: Path | str) -> Path:
    """Return the path to pass to ``open_weights``.

    For a run folder, this is the path of the newest checkpoint with undamaged weights. For a URL, it is the path of a
    local copy.

    Raises:
        CheckpointError: the path contains no weights, or the weights are damaged.
    """
    if is_remote(str(place)):
        return locate_weights_of(place)
    path = Path(place)
    if path.is_file() or (has_model(path) and not is_checkpoint(path) and not list_checkpoints(path)):
        return path
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such file or folder; expected a run folder, a checkpoint, a Hugging Face folder, or a file of "
            "nanoGPT (import a model on the hub with gpt2-pipeline export --from-hf first)"
        )
    return locate_weights_of(path)


def open_weights(path: Path) -> WeightSource:
    """Open the weights at a path that ``locate_weights`` has returned. The hashes are not verified again.

    Raises:
        CheckpointError: the weights cannot be read, or are not those of a GPT-2.
        ConfigError: the model's config is not valid.
    """
    if path.is_file():
        return _from_foreign_model(path, read_nanogpt_model(path))
    if not is_checkpoint(path):
        return _from_foreign_model(path, read_folder(path))
    state, stored = read_state(path)
    config = config_from_json(stored, origin=str(path / STATE_FILE)).model
    pieces = pieces_of_weights(path, model_shapes(config), "training")

    def copy_elements(name: str, start: int, target: Tensor) -> None:
        copy_overlap(target, start, pieces[name])

    return WeightSource(path, state.step, config, [], state.tokenizer, copy_elements)


def _from_foreign_model(path: Path, model: ForeignModel) -> WeightSource:
    return WeightSource(path, None, model.config, model.notes, model.tokenizer, model.copy_elements)

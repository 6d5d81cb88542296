"""Export a checkpoint as a folder that ``GPT2LMHeadModel.from_pretrained`` and ``AutoTokenizer`` can load."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import one_line_write_errors
from data_tools.storage.atomic import atomic_folder, partial_path
from data_tools.storage.files import require_writable
from data_tools.vocabulary import END_OF_TEXT
from pipeline.checkpoint.layout import STATE_FILE
from pipeline.checkpoint.loading import describe_other_vocabulary, pieces_of_weights, read_parameter
from pipeline.checkpoint.state import read_state
from pipeline.checkpoint.tensor_stream import StreamedTensor, write_tensors
from pipeline.checkpoint.verification import read_located
from pipeline.checkpoint.weights_copy import locate_weights_of
from pipeline.config.loading import config_from_json
from pipeline.config.schema import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.interop.export import Export, describe_positions
from pipeline.interop.foreign import model_shapes, require_gpt2
from pipeline.interop.hugging_face.layout import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    WEIGHTS_FILE,
    hugging_face_name,
    is_transposed,
    stored_shapes,
    to_config_json,
    to_generation_json,
)
from pipeline.interop.hugging_face.model_card import model_card
from pipeline.interop.hugging_face.tokenizer_files import tokenizer_files

_METADATA = {"format": "pt"}  # transformers refuses files without this entry


def export_checkpoint(checkpoint: Path | str, out: Path, dtype: str, weights: str = "training") -> Export:
    """Export a checkpoint into the folder ``out``. Only one parameter is in memory at a time.

    If the export fails, ``out`` does not change.

    Args:
        checkpoint: a checkpoint folder, or a run folder for its newest good checkpoint. Both may be URLs.
        out: a folder that does not exist or is empty.
        dtype: one of ``FORMATS[HUGGING_FACE]``.
        weights: ``training``, or ``ema`` for the moving average of the weights.

    Raises:
        CheckpointError: there is no good checkpoint with these weights, the model is not a GPT-2, or ``out`` is not
            empty.
        DataError: the folder could not be written, or another process is writing to it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out: {out} already exists and is not an empty folder; name another one")
    require_writable(out, "--out")
    return read_located(
        lambda: locate_weights_of(checkpoint, weights), lambda source: _export(source, out, dtype, weights)
    )


def _export(source: Path, out: Path, dtype: str, weights: str) -> Export:
    state, stored = read_state(source)
    config = config_from_json(stored, origin=str(source / STATE_FILE))
    require_gpt2(str(source), config.model)
    other_vocabulary = describe_other_vocabulary(config.model, state.tokenizer)
    end_of_text = None if other_vocabulary else END_OF_TEXT
    files = {
        CONFIG_FILE: _as_json(to_config_json(config.model, dtype, end_of_text)),
        GENERATION_CONFIG_FILE: _as_json(to_generation_json(end_of_text)),
        **model_card(source, state, config, weights, has_tokenizer=other_vocabulary is None),
    }
    if other_vocabulary is None:
        files |= {name: text.encode() for name, text in tokenizer_files(config.model.context_length).items()}
    with one_line_write_errors(out), atomic_folder(out, aside=partial_path(out)) as aside:
        write_tensors(
            aside / WEIGHTS_FILE, _stream_weights(source, config.model, getattr(torch, dtype), weights), _METADATA
        )
        for name, content in files.items():
            (aside / name).write_bytes(content)
    return Export(out, (out / WEIGHTS_FILE).stat().st_size, _notes(config.model, other_vocabulary))


def _notes(config: ModelConfig, other_vocabulary: str | None) -> list[str]:
    notes = []
    if other_vocabulary:
        notes.append(
            f"tokenizer: none written, because {other_vocabulary}, and only GPT-2's can be written; copy the files of "
            "the model's tokenizer into the new folder"
        )
    return notes + describe_positions(config, "transformers")


def _stream_weights(source: Path, config: ModelConfig, dtype: torch.dtype, weights: str) -> dict[str, StreamedTensor]:
    """Return all parameters by their names in ``transformers``. Each parameter is read only when it is written."""
    shapes, exported_shapes = model_shapes(config), stored_shapes(config)
    pieces = pieces_of_weights(source, shapes, weights)

    def read(name: str) -> Tensor:
        parameter = read_parameter(shapes[name], pieces[name])
        return parameter.t() if is_transposed(name) else parameter[: exported_shapes[name][0]]

    return {
        hugging_face_name(name): StreamedTensor(shape, dtype, partial(read, name))
        for name, shape in exported_shapes.items()
    }


def _as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()

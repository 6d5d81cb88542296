"""Writing a checkpoint as a folder that ``GPT2LMHeadModel.from_pretrained`` and ``AutoTokenizer`` open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import one_line_write_errors
from data_tools.storage.atomic import fsync_file, fsync_folder, partial_path, publish, write_bytes_durably
from data_tools.tokenizer import GPT2_VOCAB_SIZE
from pipeline.checkpoint import locate_checkpoint, read_manifest, read_state
from pipeline.checkpoint.loading import read_parameter
from pipeline.checkpoint.pieces import WEIGHT, Piece, index_pieces
from pipeline.checkpoint.tensor_stream import StreamedTensor, write_tensors
from pipeline.config.loading import config_from_json
from pipeline.config.schema import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.interop.hugging_face.layout import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    WEIGHTS_FILE,
    hugging_face_name,
    is_transposed,
    to_config_json,
    to_generation_json,
)
from pipeline.interop.hugging_face.model_card import model_card
from pipeline.interop.hugging_face.tokenizer_files import tokenizer_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_METADATA = {"format": "pt"}  # without it transformers refuses the file


@dataclass(frozen=True)
class Export:
    """What was written, and what a person should know of it."""

    folder: Path
    bytes: int  # of the weights
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([f"wrote {self.folder}, weights {self.bytes / 1e6:,.1f} MB", *self.notes])


def export_checkpoint(checkpoint: Path, out: Path, dtype: str) -> Export:
    """Write the folder whole or not at all; one parameter is in memory at a time.

    Args:
        checkpoint: a checkpoint, or a run folder (its newest good one).
        out: a folder that does not exist, or is empty.
        dtype: of ``DTYPES``, in which the weights are stored.

    Raises:
        CheckpointError: there is no good checkpoint, or ``out`` is in use.
        DataError: it could not be written.
    """
    _expect_free(out)
    source = locate_checkpoint(checkpoint)
    state, stored = read_state(source)
    config = config_from_json(stored, origin=str(source / "state.json"))
    files = {
        CONFIG_FILE: _as_json(to_config_json(config.model, dtype)),
        GENERATION_CONFIG_FILE: _as_json(to_generation_json(config.model)),
        **model_card(source, state, config),
    }
    if config.model.vocab_size == GPT2_VOCAB_SIZE:
        files |= {name: text.encode() for name, text in tokenizer_files(config.model.context_length).items()}
    with _appearing(out) as aside:
        write_tensors(aside / WEIGHTS_FILE, _streamed(source, config.model, DTYPES[dtype]), _METADATA)
        fsync_file(aside / WEIGHTS_FILE)
        for name, content in files.items():
            write_bytes_durably(aside / name, content)
    return Export(out, (out / WEIGHTS_FILE).stat().st_size, _notes(config.model))


def _notes(config: ModelConfig) -> list[str]:
    notes = []
    if config.vocab_size != GPT2_VOCAB_SIZE:
        notes.append(
            f"tokenizer: none written, the vocabulary has {config.vocab_size} tokens, GPT-2's {GPT2_VOCAB_SIZE}"
        )
    if config.reset_positions_at is not None:
        notes.append(
            f"positions: transformers does not let them start again at token {config.reset_positions_at} "
            "(model.reset_positions_at); give it one text at a time"
        )
    return notes


def _streamed(source: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, StreamedTensor]:
    """All parameters by their names there, in order."""
    manifest = read_manifest(source)
    pieces = index_pieces(source, manifest)[WEIGHT]
    tensors = {}
    for name, shape in manifest["parameters"].items():
        stored = [config.vocab_size, *shape[1:]] if name == "wte.weight" else list(shape)  # no padding rows
        lying = stored[::-1] if is_transposed(name) else stored
        tensors[hugging_face_name(name)] = StreamedTensor(lying, dtype, _reader(name, shape, stored[0], pieces[name]))
    return dict(sorted(tensors.items()))


def _reader(name: str, shape: list[int], rows: int, pieces: list[Piece]) -> Callable[[], list[Tensor]]:
    def read() -> list[Tensor]:
        parameter = read_parameter(shape, pieces)[:rows]
        return [parameter.t() if is_transposed(name) else parameter]

    return read


def _expect_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out: {out} already exists and is not an empty folder; name another one")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder aside to write into, which then stands under its name; what fails leaves nothing."""
    aside = partial_path(out)
    with one_line_write_errors(out):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            fsync_folder(aside)
            publish(aside, out)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()

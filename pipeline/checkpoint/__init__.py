"""Portable checkpoints: saved by any backend and world size, loaded into any other.

A checkpoint is a folder ``checkpoints/step_00000100``:

``rank_00000_weights.safetensors``    pieces of the fp32 master weights, by canonical name
``rank_00000_moments.safetensors``    the same pieces of AdamW's two moments
``state.json``                        step, samples, loss scale, seed, resolved config, versions
``manifest.json``                     format version, parameter shapes, size and SHA-256 of every file and itself

Each rank writes the pieces that it holds; nothing is gathered. Loading copies the overlap of stored pieces and local
ones, so no rank ever holds the whole state. Nothing is pickled.

A save goes through ``background`` (starts a thread), ``snapshot`` (copies to host memory), ``saving`` (writes the
files) and ``retention`` (deletes older checkpoints).
"""

from pipeline.checkpoint.background import BackgroundSaver, SaveOutcome
from pipeline.checkpoint.layout import bytes_of_tensors, list_checkpoints, read_manifest, step_of
from pipeline.checkpoint.loading import LoadedModel, load_model, load_training_state, load_weights
from pipeline.checkpoint.retention import remove_leftovers, set_aside_after
from pipeline.checkpoint.saving import SavedCheckpoint
from pipeline.checkpoint.state import GuardState, TrainingState, config_section, read_state, read_state_file
from pipeline.checkpoint.verification import find_damage, locate_checkpoint, newest_good_checkpoint

__all__ = [
    "BackgroundSaver",
    "GuardState",
    "LoadedModel",
    "SaveOutcome",
    "SavedCheckpoint",
    "TrainingState",
    "bytes_of_tensors",
    "config_section",
    "find_damage",
    "list_checkpoints",
    "load_model",
    "load_training_state",
    "load_weights",
    "locate_checkpoint",
    "newest_good_checkpoint",
    "read_manifest",
    "read_state",
    "read_state_file",
    "remove_leftovers",
    "set_aside_after",
    "step_of",
]

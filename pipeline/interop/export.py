"""Define the formats and the result of exports. This module does not import torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import ModelConfig

HUGGING_FACE, GGUF = "hugging-face", "gguf"

#: Format -> dtypes of the exported weights, by their names in torch.
FORMATS = {HUGGING_FACE: ("float32", "bfloat16"), GGUF: ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Export:
    path: Path
    bytes: int  # the size of the file with the weights
    notes: list[str]  # messages for the user

    def __str__(self) -> str:
        return "\n".join([f"wrote {self.path}, weights {self.bytes / 1e6:,.1f} MB", *self.notes])


#: Exports a checkpoint. The parameters are the checkpoint, the output path, the dtype and the weights.
ExportFunction = Callable[[Path | str, Path, str, str], Export]


def describe_positions(config: ModelConfig, program: str) -> list[str]:
    """Return a message in a list if ``reset_positions_at`` is set, because ``program`` does not support this setting.

    Otherwise, return an empty list.
    """
    if config.reset_positions_at is None:
        return []
    return [
        f"positions: {program} does not restart them at token {config.reset_positions_at} "
        "(model.reset_positions_at); give it one text at a time"
    ]

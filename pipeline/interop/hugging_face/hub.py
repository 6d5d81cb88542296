"""Folders by their name on the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)

# What is wanted, best first; the second is the format before safetensors.
_WEIGHT_PATTERNS = (["model*.safetensors", "model.safetensors.index.json"], ["pytorch_model*.bin*"])
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def folder_of(source: str) -> Path:
    """A local folder as it is; any other name is downloaded, or taken from the hub's cache.

    Raises:
        CheckpointError: there is no such folder, and the hub has none or cannot be reached.
    """
    path = Path(source)
    if path.exists() or not _NAME.fullmatch(source) or source.startswith("."):
        if not path.is_dir():
            raise CheckpointError(f"--from-hf {source}: no such folder; expected one with config.json, or a hub name")
        return path
    # Imported here: it takes a second, and a local folder needs no hub.
    from huggingface_hub import snapshot_download

    log.info("%s: no folder here, asking the Hugging Face hub", source)
    try:
        for patterns in _WEIGHT_PATTERNS:
            folder = Path(snapshot_download(source, allow_patterns=["config.json", *patterns]))
            if any(folder.glob(patterns[0])):
                return folder
    except Exception as error:  # the hub's client has dozens: no network, no such name, no access, ...
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"--from-hf {source}: no such folder here, and the hub does not give it ({type(error).__name__}: {reason})"
        ) from error
    raise CheckpointError(
        f"--from-hf {source}: the hub has no model.safetensors and no pytorch_model.bin under this name"
    )

"""Open nanoGPT's ``ckpt.pt`` or build-nanogpt's ``model_*.pt``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.interop.foreign import SettingsObject, list_keys, load_pickled_tensors

_EXPECTED = "nanoGPT's ckpt.pt or build-nanogpt's model_*.pt"


@dataclass(frozen=True)
class Section:
    """A dict in a file of nanoGPT or build-nanogpt.

    Its methods raise CheckpointError if a value has the wrong type.
    """

    where: str
    content: dict[Any, Any]

    def get(self, key: Any, kind: type[Any]) -> Any | None:
        """Return the value of a key, or None if the key is missing. If ``kind`` is float, the value may be an int."""
        if key not in self.content:
            return None
        value = self.content[key]
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.where}: {key!r} must be {kind.__name__}, found {type(value).__name__}")
        return value

    def require(self, key: Any, kind: type[Any]) -> Any:
        """Return the value of a key. Raise CheckpointError if the key is missing or its value is not a ``kind``."""
        if key not in self.content:
            raise CheckpointError(f"{self.where}: has no {key!r}; {list_keys(self.content)}; expected {_EXPECTED}")
        return self.get(key, kind)

    def section(self, key: Any) -> Section:
        """Return the dict under a key. Raises CheckpointError if the key is missing."""
        return Section(f"{self.where}: {key}", self.require(key, dict))


@dataclass(frozen=True)
class NanoGptFile:
    """The content of a file of nanoGPT or build-nanogpt, under nanoGPT's names."""

    path: Path
    content: Section
    model_args: Section
    settings: Section  # the settings of the training run; empty if the file has no settings
    is_build_nanogpt: bool

    @property
    def steps(self) -> int:
        key = "step" if self.is_build_nanogpt else "iter_num"
        steps: int = self.content.require(key, int)
        if steps < 0:
            raise CheckpointError(f"{self.content.where}: {key!r} must be at least 0, it is {steps}")
        return steps


def open_nanogpt_file(path: Path) -> NanoGptFile:
    """Open a model file of nanoGPT or build-nanogpt. Tensors are memory-mapped, and no code in the file is executed.

    Raises:
        CheckpointError: the file is damaged, or does not come from these programs.
    """
    content = Section(str(path), load_pickled_tensors(path, _EXPECTED))
    config = content.content.get("config")
    if isinstance(config, SettingsObject):
        sizes = Section(f"{path}: config", dict(vars(config)))
        return NanoGptFile(path, content, sizes, Section(f"{path}: settings", {}), is_build_nanogpt=True)
    settings = content.section("config") if "config" in content.content else Section(f"{path}: config", {})
    content.require("model", dict)  # check this first: a file without a model is another kind of file
    return NanoGptFile(path, content, content.section("model_args"), settings, is_build_nanogpt=False)

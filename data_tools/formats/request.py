"""What a conversion is asked to do: every option, its default, and what it may be."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.errors import DataError
from data_tools.formats.detection import AUTO, INPUT_FORMATS
from data_tools.formats.flat_files import LLMC, NANOGPT
from data_tools.shards import SHARD_FORMATS
from data_tools.shards.llmc import MAX_TOKENS

DEFAULT_SHARD_TOKENS = 100_000_000
OUTPUT_FORMATS = (*SHARD_FORMATS, NANOGPT, LLMC)
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """A conversion of a folder or file of tokens into a new folder.

    Attributes:
        source: a folder, a file, or what the names of a pair of Megatron's files begin with.
        out: a new or empty folder.
        to: one of ``OUTPUT_FORMATS``.
        source_format: one of ``INPUT_FORMATS``, or ``auto``.
        split_of: splits of foreign files by their names, where the names do not tell.
        shard_tokens: tokens in a shard. None: 100 million; a folder of ours keeps its shards as npy and arrow.
        name: what the names of llm.c's files begin with; None: the name of ``out``.
        workers: threads; no effect on the result. None: one for each core.
    """

    source: Path
    out: Path
    to: str
    source_format: str = AUTO
    split_of: Mapping[str, str] = field(default_factory=dict)
    shard_tokens: int | None = None
    name: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            DataError: names the option and what it may be.
        """
        if self.to not in OUTPUT_FORMATS:
            raise DataError(f"--to must be one of {', '.join(OUTPUT_FORMATS)}, it is {self.to!r}")
        if self.source_format not in (AUTO, *INPUT_FORMATS):
            raise DataError(f"--from must be one of {', '.join((AUTO, *INPUT_FORMATS))}, it is {self.source_format!r}")
        if self.shard_tokens is not None and self.to == NANOGPT:
            raise DataError("--shard-tokens: nanoGPT reads one file a split")
        if self.shard_tokens is not None and not 1 <= self.shard_tokens <= MAX_TOKENS:
            raise DataError(f"--shard-tokens must be at least 1 and at most {MAX_TOKENS}, it is {self.shard_tokens}")
        if self.workers is not None and self.workers < 1:
            raise DataError(f"--workers must be at least 1, it is {self.workers}")
        if self.name is not None and self.to != LLMC:
            raise DataError("--name is for --to llmc; other files are named by their split alone")
        if self.to == LLMC and not _FILE_NAME.fullmatch(self.file_name):
            raise DataError(f"--name: {self.file_name!r} must have letters, digits and . _ - only")

    @property
    def file_name(self) -> str:
        """What the names of llm.c's files begin with."""
        return self.name or Path(os.path.abspath(self.out)).name

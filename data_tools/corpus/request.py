"""Define the options of stage 1 and their defaults, and check the values of the options."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from data_tools.errors import DataError
from data_tools.options import BadRows, Deduplication, EncoderChoice, Engine, ShardFormat, SourceRequest

_CHOICES = {
    "format": ShardFormat,
    "deduplicate": Deduplication,
    "on_bad_rows": BadRows,
    "encoder": EncoderChoice,
    "engine": Engine,
}


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest(SourceRequest):
    """A request to stage 1: the source (see ``SourceRequest``), the output folder, and the options.

    Attributes:
        out: the path or URL of the output folder.
        format: the file format of the shards.
        val_fraction: the fraction of the documents for validation, in [0, 1).
        shard_tokens: the largest number of tokens per shard. A longer document gets its own shard.
        seed: determines which documents belong to which split.
        limit_documents: the largest number of documents to tokenize.
        limit_bytes: stop as soon as the documents contain at least this number of bytes of text in UTF-8.
        deduplicate: if ``exact``, leave out documents that equal an earlier document of the source.
        on_bad_rows: if ``skip``, leave out and report rows that cannot be read. If ``stop``, raise an error.
        workers: the number of worker processes on this machine. None means one per core, or fewer if
            the machine or container has less than 350 MB of memory per core.
        encoder: the encoder to use (see ``choose_encoder``).
        engine: ``local`` (processes on this machine) or ``ray`` (a Ray cluster).
        ray_address: the address of the Ray cluster. None means a new cluster on this machine.

    The options ``workers``, ``encoder``, ``engine`` and ``ray_address`` do not change the shards.

    Raises:
        DataError: an option has an invalid value.
    """

    out: Path | str
    format: ShardFormat = "npy"
    val_fraction: float = 0.01
    shard_tokens: int = 100_000_000
    seed: int = 0
    limit_documents: int | None = None
    limit_bytes: int | None = None
    deduplicate: Deduplication = "off"
    on_bad_rows: BadRows = "stop"
    workers: int | None = None
    encoder: EncoderChoice = "auto"
    engine: Engine = "local"
    ray_address: str | None = None

    def __post_init__(self) -> None:
        for name, literal in _CHOICES.items():
            choices, value = get_args(literal), getattr(self, name)
            if value not in choices:
                raise DataError(f"--{name.replace('_', '-')} must be one of {', '.join(choices)}, it is {value!r}")
        if self.ray_address is not None and self.engine != "ray":
            raise DataError("--ray-address needs --engine ray")
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"--val-fraction must be at least 0 and below 1, it is {self.val_fraction}")
        if not 0 <= self.seed < 1 << 64:
            raise DataError(f"--seed must be at least 0 and below 2**64, it is {self.seed}")
        for name in ("shard_tokens", "limit_documents", "limit_bytes", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"--{name.replace('_', '-')} must be at least 1, it is {value}")

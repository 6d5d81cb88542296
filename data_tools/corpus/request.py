"""What the tokenizing stage is asked to do: every option, its default, and what it may be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from data_tools.errors import DataError
from data_tools.options import Deduplication, EncoderChoice, Engine, ShardFormat
from data_tools.shards import FORMAT_VERSION, SourceRecord, TokenizerRecord
from data_tools.sources import Source, SourceRequest
from data_tools.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, TOKENIZER_NAME, load_tokenizer

_CHOICES = {
    "format": get_args(ShardFormat),
    "deduplicate": get_args(Deduplication),
    "encoder": get_args(EncoderChoice),
    "engine": get_args(Engine),
}


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest(SourceRequest):
    """One run of stage 1: a source (see ``SourceRequest``) and what to make of it.

    Attributes:
        out: the folder that will hold the shards and their manifest.
        format: of the shards, ``npy`` or ``arrow``.
        val_fraction: the share of documents for validation, in [0, 1).
        shard_tokens: a shard ends before the document that would take it past this many tokens.
        seed: of the draw that divides documents between the splits.
        limit_documents: stop after so many documents; None: never.
        limit_bytes: stop after the document that reaches so many bytes of UTF-8; None: never.
        deduplicate: ``exact`` leaves out every document that has an equal one before it.
        workers: processes on this machine; no effect on the result. None: one for each core.
        encoder: ``auto``, ``gigatoken`` or ``tiktoken``; no effect on the result.
        engine: what runs the chunks, ``local`` or ``ray``; no effect on the result.
        ray_address: of the Ray cluster; None: one is started on this machine.
    """

    out: Path | str
    format: ShardFormat = "npy"
    val_fraction: float = 0.01
    shard_tokens: int = 100_000_000
    seed: int = 0
    limit_documents: int | None = None
    limit_bytes: int | None = None
    deduplicate: Deduplication = "off"
    workers: int | None = None
    encoder: EncoderChoice = "auto"
    engine: Engine = "local"
    ray_address: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            DataError: names the option and what it may be.
        """
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise DataError(f"--{name} must be one of {', '.join(choices)}, it is {getattr(self, name)!r}")
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

    def identity(self, source: Source) -> dict[str, Any]:
        """All that decides the bytes of the result, as JSON values in the manifest's layout."""
        limits = {"limit_documents": self.limit_documents, "limit_bytes": self.limit_bytes}
        tokenizer = TokenizerRecord(TOKENIZER_NAME, GPT2_VOCAB_SIZE, END_OF_TEXT, load_tokenizer().vocabulary_sha256())
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer": asdict(tokenizer),
            "source": asdict(SourceRecord(self.source, {**source.options(), **limits})),
            "settings": {
                "format": self.format,
                "shard_tokens": self.shard_tokens,
                "val_fraction": float(self.val_fraction),
                "seed": self.seed,
                "deduplicate": self.deduplicate,
            },
        }

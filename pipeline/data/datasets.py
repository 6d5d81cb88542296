"""The data sets of a run: opened, checked against the model and each other, hashed, named for resuming."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import DataError
from data_tools.shards import (
    TRAIN_SPLIT,
    VAL_SPLIT,
    TokenizerRecord,
    TokenStream,
    expect_unchanged,
    open_split,
)
from data_tools.storage.files import sha256_of_json
from pipeline.config.schema import DataConfig, ModelConfig
from pipeline.data.mixture import Mixture
from pipeline.distributed.world import World
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataPart:
    """One data set of a run, opened."""

    name: str  # in metrics
    path: str
    weight: float  # of its samples among those of all parts
    train: TokenStream
    validation: TokenStream | None


def open_parts(data: DataConfig, model: ModelConfig) -> tuple[DataPart, ...]:
    """Open what a run trains on: the data set of ``data.path``, or those of ``data.mixture``.

    Raises:
        DataError: a data set cannot be used.
        ConfigError: its tokens are not the model's, or not those of the others.
    """
    parts = tuple(_open_part(part.name, part.path, part.weight, model) for part in data.components)
    for part in parts[1:]:
        _expect_same_tokenizer(parts[0], part)
    return parts


def _open_part(name: str, path: str, weight: float, model: ModelConfig) -> DataPart:
    train = open_split(path, TRAIN_SPLIT)
    expect_same_vocabulary(train, model, path)
    validation = open_split(path, VAL_SPLIT) if train.manifest.tokens_of(VAL_SPLIT) else None
    if validation is None:
        log.warning("%s has no validation split: no validation loss on it in this run", path)
    return DataPart(name, path, weight, train, validation)


def expect_same_vocabulary(stream: TokenStream, model: ModelConfig, path: str) -> None:
    """Refuse tokens that mean something else to the model.

    Raises:
        ConfigError: names both sizes, or both tokens that end a text.
    """
    tokenizer = stream.manifest.tokenizer
    if tokenizer.vocab_size != model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({model.vocab_size}) is not the vocabulary of {path} "
            f"({tokenizer.name}: {tokenizer.vocab_size}); it must be that"
        )
    if model.reset_positions_at not in (None, tokenizer.end_of_text):
        raise ConfigError(
            f"model.reset_positions_at ({model.reset_positions_at}) is not the token between the texts of {path} "
            f"({tokenizer.name}: {tokenizer.end_of_text}); it must be that, or null"
        )


def _expect_same_tokenizer(first: DataPart, other: DataPart) -> None:
    one, two = first.train.manifest.tokenizer, other.train.manifest.tokenizer
    if _meaning(one) != _meaning(two):
        raise ConfigError(
            f"data.mixture: {other.path} was tokenized with another vocabulary ({two.name}, "
            f"{two.vocabulary_sha256[:12]}) than {first.path} ({one.name}, {one.vocabulary_sha256[:12]}); "
            "tokenize one of them again"
        )


def _meaning(tokenizer: TokenizerRecord) -> tuple[int, int, str]:
    """What two tokenizers must have in common for an id to mean the same, whatever they are called."""
    return tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.vocabulary_sha256


def data_sha256(parts: Sequence[DataPart]) -> str:
    """What a checkpoint remembers of its data: the hash of the manifest; of a mixture, of its manifests and shares.

    Without when and with what the data were made: the same data made again are the same.
    """
    manifests = [part.train.manifest.content_sha256() for part in parts]
    if len(parts) == 1:
        return manifests[0]
    shares = [str(share) for share in Mixture([part.weight for part in parts]).shares]
    return sha256_of_json({"mixture": list(zip(manifests, shares, strict=True))})


def verify_parts(parts: Sequence[DataPart], world: World) -> None:
    """Hash every shard against its manifest, each rank its share. Collective.

    Raises:
        DataError: the first that differs.
    """
    started, problem = time.perf_counter(), None
    shards = [(Path(part.path), shard) for part in parts for shard in part.train.manifest.shards]
    try:
        for folder, shard in shards[world.rank :: world.size]:
            expect_unchanged(folder, shard)
    except DataError as error:
        problem = str(error)
    problems = [text for text in world.gather(problem) if text]

    def report() -> None:
        if problems:
            raise DataError(problems[0])
        log.info("data      %d shards verified in %.1f s", len(shards), time.perf_counter() - started)

    world.call_on_main(report)

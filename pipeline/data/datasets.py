"""Open and check the datasets of a run."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.formatting import count_of
from data_tools.shards.manifest import MANIFEST_NAME, TRAIN_SPLIT, VAL_SPLIT, TokenizerRecord
from data_tools.shards.reader import TokenStream, open_split
from data_tools.shards.verification import require_unchanged
from data_tools.storage.json_values import sha256_of_json
from pipeline.config.paths import find_path
from pipeline.config.schema import Config, MixtureComponent, ModelConfig
from pipeline.data.sample_order import Mixture
from pipeline.distributed.world import World
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenDataset:
    """A dataset of a run, with its splits as open token streams."""

    name: str  # in metrics
    path: str
    weight: float  # the dataset's share of the samples is weight / sum of all weights
    train: TokenStream
    validation: TokenStream | None


def open_datasets(config: Config) -> tuple[TokenDataset, ...]:
    """Open the dataset at ``data.path``, or the datasets of ``data.mixture``.

    Raises:
        DataError: a dataset cannot be used.
        ConfigError: the model and the datasets do not have the same vocabulary, ``evaluation.sample`` is set and this
            vocabulary is not GPT-2's, or a required validation split is missing.
    """
    datasets = tuple(_open_dataset(component, config) for component in config.data.components)
    if (keys := config.keys_that_need_validation) and not any(dataset.validation for dataset in datasets):
        raise ConfigError(
            f"{keys[0]} needs the validation loss, and no dataset of this run has a validation split; tokenize again "
            f"with a larger --val-fraction, or leave {' and '.join(keys)} out"
        )
    for dataset in datasets[1:]:
        _check_same_tokenizer(datasets[0], dataset)
    if config.evaluation.sample and not (tokenizer := tokenizer_of(datasets)).is_gpt2:
        raise ConfigError(
            f"evaluation.sample needs GPT-2's vocabulary, and {datasets[0].path} was tokenized with {tokenizer}; "
            "set evaluation.sample to false"
        )
    return datasets


def tokenizer_of(datasets: Sequence[TokenDataset]) -> TokenizerRecord:
    """Return the tokenizer of the datasets of a run."""
    return datasets[0].train.manifest.tokenizer


def _open_dataset(component: MixtureComponent, config: Config) -> TokenDataset:
    path = find_path(component.path, config.run)
    train = open_split(path, TRAIN_SPLIT)
    check_same_vocabulary(train, config.model, path)
    validation = open_split(path, VAL_SPLIT) if train.manifest.tokens_of(VAL_SPLIT) else None
    if validation is None:
        log.warning("%s has no validation split: this run has no validation loss for it", path)
    return TokenDataset(component.name, path, component.weight, train, validation)


def check_same_vocabulary(
    stream: TokenStream, model: ModelConfig, path: str, trained_on: TokenizerRecord | None = None
) -> None:
    """Raise ConfigError if a dataset and a model differ in vocabulary or end-of-text token.

    Args:
        trained_on: the tokenizer of the data on which the model was trained. If None, the vocabularies may be of
            different tokenizers with the same number of tokens.
    """
    tokenizer = stream.manifest.tokenizer
    cure = "name shards of the model's tokenizer, or train a new model with"
    if tokenizer.vocab_size != model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({model.vocab_size}) is not the vocabulary size of {path} "
            f"({tokenizer.name}: {tokenizer.vocab_size}); {cure} model.vocab_size={tokenizer.vocab_size}"
        )
    if model.reset_positions_at not in (None, tokenizer.end_of_text):
        raise ConfigError(
            f"model.reset_positions_at ({model.reset_positions_at}) is not the end-of-text token of {path} "
            f"({tokenizer.name}: {tokenizer.end_of_text}); {cure} model.reset_positions_at={tokenizer.end_of_text}, or "
            "null"
        )
    if trained_on and trained_on.differs_from(tokenizer):
        raise ConfigError(
            f"{path} was tokenized with {tokenizer}, and the model was trained on tokens of {trained_on}; name shards "
            "of the model's tokenizer"
        )


def _check_same_tokenizer(first: TokenDataset, other: TokenDataset) -> None:
    """Raise ConfigError if the vocabularies differ. Tokenizers with different names can have the same vocabulary."""
    one, two = first.train.manifest.tokenizer, other.train.manifest.tokenizer
    keys = ("vocab_size", "end_of_text", "vocabulary_sha256")
    if any(getattr(one, key) != getattr(two, key) for key in keys):
        raise ConfigError(
            f"data.mixture: {other.path} was tokenized with another vocabulary, {two}, than {first.path}, {one}; "
            "tokenize one of them again"
        )


def data_sha256(datasets: Sequence[TokenDataset]) -> str:
    """Return a hash of the datasets' manifests. For a mixture, the hash also depends on the weights.

    Tokenizing again with the same options does not change the hash.
    """
    manifests = [dataset.train.manifest.content_sha256() for dataset in datasets]
    if len(datasets) == 1:
        return manifests[0]
    shares = [str(share) for share in Mixture([dataset.weight for dataset in datasets]).shares]
    return sha256_of_json({"mixture": list(zip(manifests, shares, strict=True))})


def verify_datasets(datasets: Sequence[TokenDataset], world: World) -> None:
    """Raise DataError if the hash of a shard differs from the hash in the manifest.

    Every rank must call this function, because the ranks share the work. If hosts have their own copies of the data,
    the ranks with the same copy share the work.
    """
    started = time.perf_counter()
    shards = [(Path(dataset.path), shard) for dataset in datasets for shard in dataset.train.manifest.shards]
    copies = world.gather([_identify(Path(dataset.path, MANIFEST_NAME)) for dataset in datasets])
    sharing = [rank for rank, copy in enumerate(copies) if copy == copies[world.rank]]

    def verify_share() -> None:
        for folder, shard in shards[sharing.index(world.rank) :: len(sharing)]:
            require_unchanged(folder, shard)

    world.call_on_each(verify_share)
    log.info("data      %s verified in %.1f s", count_of(len(shards), "shard"), time.perf_counter() - started)


def _identify(path: Path) -> tuple[int, int, int]:
    """Return values that all hosts see if they share the file. Copies of a file have other values."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns

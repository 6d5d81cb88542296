"""Define the task ``validation`` of stage 3, which scores a whole validation split of token shards."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_tools.errors import DataError
from data_tools.shards.manifest import VAL_SPLIT, load_manifest
from data_tools.shards.reader import TokenStream, open_split
from pipeline.checkpoint.loading import LoadedModel
from pipeline.config.paths import find_path
from pipeline.config.schema import Config, MixtureComponent
from pipeline.data.datasets import check_same_vocabulary
from pipeline.data.loader import scored_targets
from pipeline.evaluation.protocols import Figures
from pipeline.evaluation.results import VALIDATION, hash_mixture
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.validation import mixture_loss, score_split
from pipeline.run_folder.metrics import perplexity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedSplit:
    """The validation split of one folder of token shards."""

    path: str
    stream: TokenStream
    seq_len: int
    name: str = VALIDATION

    @property
    def has_targets(self) -> bool:
        """Return whether the loss mask and the length of the split leave a target to score."""
        if self.stream.has_mask:
            return bool(scored_targets(self.stream, self.seq_len).any())
        return self.stream.tokens > 1

    def measure(self, scorer: Scorer) -> tuple[Figures, list[Figures]]:
        """Score the split. Return the results, and no examples.

        Every rank must call this method.
        """
        batch_size = scorer.batch_tokens // self.seq_len
        result = score_split(scorer.compute, self.stream, self.seq_len, batch_size, scorer.world)
        return {"data": self.path, "data_sha256": self.stream.manifest.content_sha256(), **result}, []


@dataclass(frozen=True)
class PreparedMixture:
    """The validation splits of the datasets in ``data.mixture``, and the weights of all its datasets, by name."""

    splits: Mapping[str, PreparedSplit]
    weights: Mapping[str, float]
    sha256: str  # of all datasets and their weights
    name: str = VALIDATION

    def measure(self, scorer: Scorer) -> tuple[Figures, list[Figures]]:
        """Score all splits. Return their results and the weighted mean of their losses, and no examples.

        Every rank must call this method.
        """
        parts = {name: split.measure(scorer)[0] for name, split in self.splits.items()}
        losses = {name: result["loss"] for name, result in parts.items()}
        loss = mixture_loss(losses, self.weights)
        by_name = {f"{name}_loss": value for name, value in losses.items()}
        facts = {"data": "data.mixture", "data_sha256": self.sha256}
        return {**facts, "loss": loss, "perplexity": perplexity(loss), **by_name, "parts": parts}, []


def prepare_validation(loaded: LoadedModel, given: str | None) -> PreparedSplit | PreparedMixture:
    """Open the validation split at the path ``given``, or the split or splits of the run's data if it is None.

    Datasets of a mixture without a validation split or without a target to score are left out. If a run without a
    mixture was trained on other data than its folder now holds, log a warning.

    Raises:
        ConfigError: the dataset and the model differ in their vocabulary.
        DataError: there is no validation split, or it has no target to score.
    """
    config = loaded.config
    if given is None and config.data.mixture is not None:
        return _prepare_mixture(config.data.mixture, loaded)
    path = find_path(given or config.data.components[0].path, config.run)
    split = _open_split(path, config)
    if split is None:
        raise DataError(f"{path} has no split {VAL_SPLIT!r}; name a folder that has one with --data validation=DIR")
    if not split.has_targets:
        raise DataError(f"{path}: the split {VAL_SPLIT!r} has no scored target; tokenize more text")
    check_same_vocabulary(split.stream, config.model, path, loaded.tokenizer)
    if given is None and loaded.data_sha256 not in (None, split.stream.manifest.content_sha256()):
        log.warning(
            "%s now holds other data than the run was trained on: the validation split may contain documents that the "
            "model has seen, and the loss cannot be compared with the run's",
            path,
        )
    return split


def _prepare_mixture(mixture: Sequence[MixtureComponent], loaded: LoadedModel) -> PreparedMixture:
    config = loaded.config
    opened = {component.name: _open_split(find_path(component.path, config.run), config) for component in mixture}
    splits = {name: split for name, split in opened.items() if split and split.has_targets}
    if not splits:
        raise DataError(
            "data.mixture: no component has a validation split with scored targets; "
            "name a dataset that has one with --data validation=DIR"
        )
    for split in splits.values():
        check_same_vocabulary(split.stream, config.model, split.path, loaded.tokenizer)
    weights = {component.name: component.weight for component in mixture}
    return PreparedMixture(splits, weights, hash_mixture(config))


def _open_split(path: str, config: Config) -> PreparedSplit | None:
    """Open the validation split of token shards. Returns None if there is none."""
    if not load_manifest(path).tokens_of(VAL_SPLIT):
        return None
    return PreparedSplit(path, open_split(path, VAL_SPLIT), config.seq_len)

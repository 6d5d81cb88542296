"""Check whether the validation split is large enough to measure a stable loss."""

from data_tools.shards.manifest import VAL_SPLIT, Manifest

#: The loss of a token has a standard deviation of about 3 nats, so the mean over this many has an error of about 0.02.
SMALLEST_VALIDATION_TOKENS = 16_384
#: Whole documents are drawn, so the fraction of the tokens can differ from the requested fraction.
_SMALLEST_RATIO = 0.25


def describe_small_validation(manifest: Manifest) -> str | None:
    """Return a warning if the validation split is too small for a stable loss, or much smaller than requested.

    Otherwise, or without a validation split, return None.
    """
    tokens = manifest.tokens_of(VAL_SPLIT)
    share = tokens / max(sum(shard.tokens for shard in manifest.shards), 1)
    requested: object = manifest.settings.get("val_fraction")
    if not tokens:
        return None
    documents = sum(shard.documents for shard in manifest.shards_of(VAL_SPLIT))
    size = f"the validation split has {tokens:,} tokens in {documents:,} documents, {share:.2%} of all tokens"
    cure = "tokenize into another folder with a larger --val-fraction"
    if tokens < SMALLEST_VALIDATION_TOKENS:
        return f"{size}; losses on fewer than {SMALLEST_VALIDATION_TOKENS:,} tokens are noisy: {cure}"
    if isinstance(requested, float) and share < _SMALLEST_RATIO * requested:
        return f"{size}; --val-fraction {requested:g} of the documents were requested: {cure}, or another --seed"
    return None

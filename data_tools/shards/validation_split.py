"""Check whether the validation split is large enough to measure a stable loss."""

from data_tools.formatting import count_of
from data_tools.shards.manifest import VAL_SPLIT, Manifest

#: The mean loss of this many tokens has an error of about 0.02 nats, because the loss of one token has a standard
#: deviation of about 3 nats.
SMALLEST_VALIDATION_TOKENS = 16_384
#: The least ratio of the real fraction to the requested fraction. They differ, because whole documents are drawn.
_SMALLEST_RATIO = 0.25
#: A requested number of documents, and a multiple of the smallest number of tokens, with which a split is rarely too
#: small.
_ENOUGH_DOCUMENTS, _MARGIN = 16, 3
_LARGEST_FRACTION = 0.3
_ENOUGH_TEXT = "tokenize more text into another folder: 500,000 tokens in 200 documents suffice with --val-fraction 0.1"


def describe_small_validation(manifest: Manifest) -> str | None:
    """Return a warning if the validation split is too small for a stable loss, or much smaller than requested.

    Return None if the split is large enough, or if there is no validation split.
    """
    tokens = manifest.tokens_of(VAL_SPLIT)
    fraction = tokens / max(sum(shard.tokens for shard in manifest.shards), 1)
    requested: object = manifest.settings.get("val_fraction")
    if not tokens:
        return None
    documents = sum(shard.documents for shard in manifest.shards_of(VAL_SPLIT))
    found = f"{count_of(tokens, 'token')} in {count_of(documents, 'document')}"
    size = f"the validation split has {found}, {fraction:.2%} of all tokens"
    cure = advise_larger_validation(manifest)
    if tokens < SMALLEST_VALIDATION_TOKENS:
        return f"{size}; losses on fewer than {SMALLEST_VALIDATION_TOKENS:,} tokens are noisy: {cure}"
    if isinstance(requested, float) and fraction < _SMALLEST_RATIO * requested:
        return f"{size}; --val-fraction {requested:g} of the documents were requested: {cure}"
    return None


def advise_larger_validation(manifest: Manifest) -> str:
    """Return a text that tells the user how to get a validation split that is large enough for a stable loss."""
    requested: object = manifest.settings.get("val_fraction")
    if not isinstance(requested, float):
        return "make a larger one with the program that wrote these tokens"
    tokens = max(sum(shard.tokens for shard in manifest.shards), 1)
    documents = max(sum(shard.documents for shard in manifest.shards), 1)
    needed = _MARGIN * SMALLEST_VALIDATION_TOKENS / tokens
    if not (manifest.report or {}).get("divided_documents"):  # a single text is cut at the requested fraction
        needed = max(needed, _ENOUGH_DOCUMENTS / documents)
    if needed > _LARGEST_FRACTION:
        return _ENOUGH_TEXT
    if needed <= requested:  # unlucky: few or short documents were drawn
        return "tokenize into another folder with another --seed"
    return f"tokenize into another folder with --val-fraction {1.05 * needed:.2g}"

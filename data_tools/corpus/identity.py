"""Define the identity of a tokenize request: all values on which the bytes of the shards depend."""

from dataclasses import asdict
from typing import Any

from data_tools.corpus.request import TokenizeRequest
from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.shards.manifest import FORMAT_VERSION, SourceRecord
from data_tools.sources import Source


def identity_of(request: TokenizeRequest, source: Source) -> dict[str, Any]:
    """Return the identity of a request: all values on which the bytes of the shards depend, as JSON values.

    The manifest contains all these values.
    """
    limits: dict[str, Any] = {"limit_documents": request.limit_documents, "limit_bytes": request.limit_bytes}
    if request.on_bad_rows != "stop":  # absent by default, as in the manifests of earlier versions
        limits["on_bad_rows"] = request.on_bad_rows
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": asdict(gpt2_tokenizer_record()),
        "source": asdict(SourceRecord(request.source, {**source.options(), **limits})),
        "settings": {
            "format": request.format,
            "shard_tokens": request.shard_tokens,
            "val_fraction": float(request.val_fraction),
            "seed": request.seed,
            "deduplicate": request.deduplicate,
        },
    }

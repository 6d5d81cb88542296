"""GPT-2's tokenizer as the files that ``AutoTokenizer`` and other programs read, made from its ranks."""

from __future__ import annotations

import json
from typing import Any

from data_tools.tokenizer import END_OF_TEXT, byte_of_printable, load_tokenizer

END_OF_TEXT_TOKEN = "<|endoftext|>"


def tokenizer_files(context_length: int) -> dict[str, str]:
    """Contents of the files by name."""
    vocabulary, merges = _vocabulary_and_merges()
    settings = {
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT_TOKEN,
        "eos_token": END_OF_TEXT_TOKEN,
        "unk_token": END_OF_TEXT_TOKEN,
        "model_max_length": context_length,
        "tokenizer_class": "GPT2Tokenizer",
    }
    return {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]),
        "tokenizer.json": json.dumps(_tokenizer_json(vocabulary, merges), indent=1, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(
            {key: END_OF_TEXT_TOKEN for key in ("bos_token", "eos_token", "unk_token")}, indent=2
        )
        + "\n",
    }


def _vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens in printable characters -> ids, and the pairs whose merging makes each but the single bytes."""
    tokens = load_tokenizer().token_bytes
    printable = {byte: char for char, byte in byte_of_printable().items()}
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def show(token: bytes) -> str:
        return "".join(map(printable.__getitem__, token))

    merges = [_last_pair(token, ranks) for token in tokens if len(token) > 1]
    vocabulary = {show(token): rank for token, rank in ranks.items()}
    vocabulary[END_OF_TEXT_TOKEN] = END_OF_TEXT
    return vocabulary, [(show(left), show(right)) for left, right in merges]


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a token is merged from: what byte-pair encoding makes of it with the earlier ranks."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        at = pair_ranks.index(min(pair_ranks))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _tokenizer_json(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The format of the library ``tokenizers``."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end_of_text = {
        "id": END_OF_TEXT,
        "content": END_OF_TEXT_TOKEN,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }

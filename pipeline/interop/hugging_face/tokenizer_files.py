"""The files of GPT-2's tokenizer that ``AutoTokenizer`` and other programs read."""

import itertools
import json
from typing import Any

from data_tools.tokenizer import END_OF_TEXT, byte_of_printable, load_tokenizer

END_OF_TEXT_TOKEN = "<|endoftext|>"


def tokenizer_files(context_length: int) -> dict[str, str]:
    """Return the contents of the files by name."""
    vocabulary, merges = _vocabulary_and_merges()
    special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT_TOKEN)
    settings = {
        "add_prefix_space": False,
        **special_tokens,
        "model_max_length": context_length,
        "tokenizer_class": "GPT2Tokenizer",
    }
    return {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]),
        "tokenizer.json": json.dumps(_tokenizer_json(vocabulary, merges), indent=1, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special_tokens, indent=2) + "\n",
    }


def _vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the ids of all tokens in printable characters, and the pair that each longer token is merged from."""
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
    """Return the two tokens that a token is merged from, by byte-pair encoding it with the ranks before its own."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        pair_ranks = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(pieces)]
        at = pair_ranks.index(min(pair_ranks))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces[0], pieces[1]


def _tokenizer_json(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the contents of ``tokenizer.json``, in the format of the library ``tokenizers``."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end_of_text = {
        "id": END_OF_TEXT,
        "content": END_OF_TEXT_TOKEN,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
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

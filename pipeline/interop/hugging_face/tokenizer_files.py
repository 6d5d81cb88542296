"""Create the files of GPT-2's tokenizer that other programs read."""

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from data_tools.errors import DataError
from data_tools.tokenizer import byte_of_printable, load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.checkpoint.json_files import read_json_object
from pipeline.errors import CheckpointError

END_OF_TEXT_TOKEN = "<|endoftext|>"
VOCABULARY_FILE = "vocab.json"
_TOKENIZER_FILE = "tokenizer.json"


def tokenizer_files(context_length: int) -> dict[str, str]:
    vocabulary, merges = vocabulary_and_merges()
    special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT_TOKEN)
    settings = {
        "add_prefix_space": False,
        **special_tokens,
        "model_max_length": context_length,
        "tokenizer_class": "GPT2Tokenizer",
    }
    return {
        VOCABULARY_FILE: json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]),
        _TOKENIZER_FILE: json.dumps(_tokenizer_json(vocabulary, merges), indent=1, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special_tokens, indent=2) + "\n",
    }


@cache
def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return GPT-2's vocabulary (token to id) and its merges. A merge is a pair of tokens that form a longer token.

    Each byte of a token is written as a printable character.
    """
    tokens = load_tokenizer().token_bytes
    ranks = {token: rank for rank, token in enumerate(tokens)}
    show = _printer()
    merges = [_last_pair(token, ranks) for token in tokens if len(token) > 1]
    return _vocabulary(), [(show(left), show(right)) for left, right in merges]


def _vocabulary() -> dict[str, int]:
    show = _printer()
    vocabulary = {show(token): rank for rank, token in enumerate(load_tokenizer().token_bytes)}
    return {**vocabulary, END_OF_TEXT_TOKEN: END_OF_TEXT}


def _printer() -> Callable[[bytes], str]:
    printable = {byte: char for char, byte in byte_of_printable().items()}
    return lambda token: "".join(map(printable.__getitem__, token))


def describe_other_tokenizer(folder: Path) -> str | None:
    """Return a message for the user if the tokenizer in a folder lacks a token of GPT-2, or gives a token another id.

    Otherwise, return None. The result is also None if the folder has no tokenizer, or if GPT-2's vocabulary cannot be
    loaded.

    Raises:
        CheckpointError: a file of the tokenizer is malformed.
    """
    path, vocabulary = _read_vocabulary(folder)
    if vocabulary is None:
        return None
    try:
        ours = _vocabulary()
    except DataError:
        return None
    differing = [token for token, rank in ours.items() if vocabulary.get(token) != rank]
    if not differing:
        return None
    return (
        f"tokenizer: {path} is not GPT-2's ({len(differing)} of {len(ours)} tokens have another id, or none); train "
        "and evaluate on shards of that tokenizer only, because text is always encoded with GPT-2's here; after an "
        "export, copy the files of that tokenizer into the new folder"
    )


def _read_vocabulary(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """Return the path of a folder's vocabulary, and the id of each token. Without a vocabulary, the ids are None."""
    path = folder / VOCABULARY_FILE
    if path.is_file():
        return path, read_json_object(path)
    path = folder / _TOKENIZER_FILE
    if not path.is_file():
        return path, None
    model = read_json_object(path).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        raise CheckpointError(f"{path}: 'model' must be an object with 'vocab', an object of ids by token")
    return path, vocabulary


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that GPT-2's tokenizer merges into ``token``."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        pair_ranks = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(pieces)]
        at = pair_ranks.index(min(pair_ranks))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces[0], pieces[1]


def _tokenizer_json(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
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

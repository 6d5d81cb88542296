"""Open token files of any format: recognize their format, and group them by split."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from data_tools.errors import DataError, one_line_read_errors
from data_tools.formats.collection import Concatenated, Split, TokenCollection, Tokens, require_split_name
from data_tools.formats.flat_files import (
    LLMC,
    NANOGPT,
    NANOGPT_NAMES,
    NPY,
    NPY_SUFFIX,
    is_npy,
    open_llmc_file,
    open_nanogpt_file,
    open_npy_file,
)
from data_tools.formats.megatron import INDEX_SUFFIX, MEGATRON, is_index, open_megatron_pair, tokens_file_of
from data_tools.options import AUTO, InputFormat
from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.shards.llmc import LLMC_SUFFIX, is_llmc
from data_tools.shards.manifest import (
    MANIFEST_NAME,
    TRAIN_SPLIT,
    VAL_SPLIT,
    SourceRecord,
    TokenizerRecord,
    load_manifest,
)
from data_tools.shards.reader import TokenStream
from data_tools.storage.content import require_fetched

NATIVE = "native"
# Functions that open a file (for Megatron, the index). They take the path and the size of the vocabulary.
_OPEN_FILE: dict[str, Callable[[Path, int], Tokens]] = {
    NANOGPT: open_nanogpt_file,
    LLMC: open_llmc_file,
    MEGATRON: open_megatron_pair,
    NPY: open_npy_file,
}
_SUFFIXES = {NANOGPT: LLMC_SUFFIX, LLMC: LLMC_SUFFIX, MEGATRON: INDEX_SUFFIX, NPY: NPY_SUFFIX}
INPUT_FORMATS = get_args(InputFormat)
_SPLIT_WORDS = {
    "train": TRAIN_SPLIT,
    "val": VAL_SPLIT,
    "valid": VAL_SPLIT,
    "validation": VAL_SPLIT,
    "test": "test",
}


def open_collection(
    path: Path,
    format: str = AUTO,
    split_of: Mapping[str, str] | None = None,
    tokenizer: TokenizerRecord | None = None,
) -> TokenCollection:
    """Open the tokens in a folder, in a file, or in a pair of Megatron's files.

    Args:
        path: the folder or the file. For a pair of files, the path without ``.bin`` and ``.idx``.
        format: one of ``INPUT_FORMATS``, or ``auto`` (see ``recognize``).
        split_of: maps names of files to splits. A file of another program needs an entry if its name does not contain
            the split.
        tokenizer: the tokenizer of the files of another program. None means GPT-2's.

    Raises:
        DataError: the format is not recognized, or the split of a file is unknown.
    """
    format = recognize(path) if format == AUTO else format
    if tokenizer and format in (NATIVE, MEGATRON):
        reason = "its manifest names its vocabulary" if format == NATIVE else "Megatron's files need GPT-2's vocabulary"
        raise DataError(f"--vocab-size: {path}: {reason}")
    if format == NATIVE:
        if split_of:
            raise DataError(f"--split-of: the manifest of {path} names its splits")
        manifest = load_manifest(path)
        splits = {
            split: Split(
                TokenStream(path, manifest, split),
                {path / shard.file: shard.tokens for shard in manifest.shards_of(split)},
            )
            for split in manifest.splits()
        }
        return TokenCollection(path, NATIVE, manifest.tokenizer, manifest.source, splits, manifest)
    suffix = _SUFFIXES[format]
    with one_line_read_errors(path):
        files = _candidates(path, suffix)
        if not files:
            raise DataError(f"{path}: no file ends in {suffix}, as those of {format} do")
        return _open_files(path, format, files, split_of or {}, tokenizer or gpt2_tokenizer_record())


def recognize(path: Path) -> str:
    """Return the format of a file or folder.

    A folder with a manifest has this project's format. Files of nanoGPT are recognized by their names ``train.bin`` and
    ``val.bin``. Other files are recognized by their first bytes.

    Raises:
        DataError: the format is not recognized.
    """
    with one_line_read_errors(path):
        if path.is_dir() and (path / MANIFEST_NAME).exists():
            return NATIVE
        if any(is_index(file) for file in _candidates(path, INDEX_SUFFIX)):
            return MEGATRON
        files = _candidates(path, LLMC_SUFFIX)
        if any(is_llmc(file) for file in files):
            return LLMC
        arrays = _candidates(path, NPY_SUFFIX)
        if any(is_npy(file) for file in arrays):
            return NPY
        if any(file.name in NANOGPT_NAMES for file in files):
            return NANOGPT
        for file in {*files, *arrays}:
            require_fetched(file)
    raise DataError(
        f"{path}: no manifest.json, no .idx of Megatron, no .bin with llm.c's header, none named {NANOGPT_NAMES[0]}, "
        f"no array in .npy; --from says what it is ({', '.join(INPUT_FORMATS)})"
    )


def _candidates(path: Path, suffix: str) -> list[Path]:
    """Return the files of a folder that have this suffix, sorted by name. For a file, return the file itself."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix == suffix and not file.name.startswith("."))
    if suffix == INDEX_SUFFIX:
        # The user may give the index file, the file of tokens, or the common prefix of both names.
        named = [path if path.suffix == suffix else path.with_suffix(suffix), path.with_name(path.name + suffix)]
        return [file for file in named if file.exists()][:1]
    if not path.exists():
        raise DataError(f"{path} does not exist")
    return [path]


def _open_files(
    path: Path, format: str, files: Sequence[Path], split_of: Mapping[str, str], tokenizer: TokenizerRecord
) -> TokenCollection:
    splits = {}
    for split, members in _group_by_split(files, split_of).items():
        streams = {file: _OPEN_FILE[format](file, tokenizer.vocab_size) for file in members}
        tokens_of_file = {file: stream.tokens for file, stream in streams.items()}
        splits[split] = Split(Concatenated(list(streams.values())), tokens_of_file)
    counted = [*files, *map(tokens_file_of, files)] if format == MEGATRON else files
    size = sum(file.stat().st_size for file in counted)
    source = SourceRecord(format, {"input": path.as_posix(), "files": len(counted), "bytes": size})
    return TokenCollection(path, format, tokenizer, source, splits)


def _group_by_split(paths: Sequence[Path], split_of: Mapping[str, str]) -> dict[str, list[Path]]:
    """Group the files by split, in their order. The training split comes first.

    1. Use the split that ``split_of`` gives for the name of the file, with or without its suffix.
    2. Otherwise, use the last word in the name that is the name of a split, such as ``train`` or ``valid``.
    3. Otherwise, a single file is for training. Several files are an error.
    """
    for name, split in split_of.items():
        require_split_name(split, f"--split-of {name}={split}")
        if name not in {known for path in paths for known in (path.name, path.stem)}:
            names = [path.name for path in paths]
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise DataError(f"--split-of {name}={split}: this file does not exist; the files are {listed}")
    groups: dict[str, list[Path]] = {}
    for path in paths:
        words = [_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in _SPLIT_WORDS]
        named = split_of.get(path.name) or split_of.get(path.stem) or (words[-1] if words else None)
        if named is None and len(paths) > 1:
            raise DataError(
                f"{path}: its name does not tell its split; add --split-of {path.name}={TRAIN_SPLIT} (or {VAL_SPLIT})"
            )
        groups.setdefault(named or TRAIN_SPLIT, []).append(path)
    return dict(sorted(groups.items(), key=lambda group: group[0] != TRAIN_SPLIT))

"""Opening tokens of any format: recognizing the format by content, and listing its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data_tools.errors import DataError, one_line_read_errors
from data_tools.formats.collection import Split, TokenCollection
from data_tools.formats.flat_files import LLMC, NANOGPT, NANOGPT_NAMES, open_llmc, open_nanogpt
from data_tools.formats.megatron import INDEX_SUFFIX, MEGATRON, is_index, open_megatron
from data_tools.shards.llmc import LLMC_SUFFIX, is_llmc
from data_tools.shards.manifest import MANIFEST_NAME, load_manifest
from data_tools.shards.reader import TokenStream

AUTO = "auto"
NATIVE = "native"
_OPEN_FOREIGN: dict[str, Callable[[Path, Sequence[Path], Mapping[str, str]], TokenCollection]] = {
    NANOGPT: open_nanogpt,
    LLMC: open_llmc,
    MEGATRON: open_megatron,
}
INPUT_FORMATS = (NATIVE, *_OPEN_FOREIGN)


def open_collection(path: Path, format: str = AUTO, split_of: Mapping[str, str] | None = None) -> TokenCollection:
    """Open a folder, a file, or (Megatron) the common prefix of the names of a pair of files.

    Args:
        format: one of ``INPUT_FORMATS``, or ``auto`` to recognize it as ``recognize`` does.
        split_of: splits of another program's files by name, for files whose name does not contain it.

    Raises:
        DataError: nothing exists there, the format cannot be recognized, or a file is damaged; one line that names it.
    """
    format = recognize(path) if format == AUTO else format
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
    suffix = INDEX_SUFFIX if format == MEGATRON else LLMC_SUFFIX
    with one_line_read_errors(path):
        files = _candidates(path, suffix)
        if not files:
            raise DataError(f"{path}: no file ends in {suffix}, as those of {format} do")
        return _OPEN_FOREIGN[format](path, files, split_of or {})


def recognize(path: Path) -> str:
    """Return the format of a file or folder.

    A folder with a manifest is ours. Megatron's and llm.c's files begin with their magic. Bare tokens count as
    nanoGPT's if the file is named ``train.bin`` or ``val.bin``.

    Raises:
        DataError: the format cannot be recognized, or a file cannot be read.
    """
    with one_line_read_errors(path):
        if path.is_dir() and (path / MANIFEST_NAME).exists():
            return NATIVE
        if any(is_index(file) for file in _candidates(path, INDEX_SUFFIX)):
            return MEGATRON
        files = _candidates(path, LLMC_SUFFIX)
        if any(is_llmc(file) for file in files):
            return LLMC
        if any(file.name in NANOGPT_NAMES for file in files):
            return NANOGPT
    raise DataError(
        f"{path}: no manifest.json, no .idx of Megatron, no .bin with llm.c's header, none named {NANOGPT_NAMES[0]}; "
        f"--from says what it is ({', '.join(INPUT_FORMATS)})"
    )


def _candidates(path: Path, suffix: str) -> list[Path]:
    """Return the files of another program, sorted by name: those of a folder with this suffix, or the one named."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix == suffix and not file.name.startswith("."))
    if suffix == INDEX_SUFFIX:
        # The user may name the index, its file of tokens, or what Megatron calls the prefix.
        named = [path if path.suffix == suffix else path.with_suffix(suffix), path.with_name(path.name + suffix)]
        return [file for file in named if file.exists()][:1]
    if not path.exists():
        raise DataError(f"{path} does not exist")
    return [path]

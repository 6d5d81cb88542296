"""The kinds of sources by name, the options each one reads, and opening one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol, get_args

from data_tools.encoding.documents import Document
from data_tools.errors import DataError
from data_tools.options import SourceKind
from data_tools.sources.huggingface import HuggingFaceSource
from data_tools.sources.instructions import InstructionSource
from data_tools.sources.jsonl import JsonlSource
from data_tools.sources.parquet import ParquetSource
from data_tools.sources.slices import Slice
from data_tools.sources.standard_library import StandardLibrarySource
from data_tools.sources.text import TextSource

FINEWEB_EDU_DATASET = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_CONFIG = "sample-10BT"


class Source(Protocol):
    """A repeatable sequence of documents, cut into slices that can be read by themselves, anywhere."""

    def options(self) -> dict[str, Any]:
        """All that decides which documents come, as JSON values; equal options, equal documents."""
        ...

    def text_bytes(self) -> int | None:
        """About how many bytes of text there are; None: that is not known before reading."""
        ...

    def slices(self, slice_bytes: int) -> list[Slice]:
        """Parts of about ``slice_bytes`` of text where the files allow it, in order."""
        ...

    def read(self, part: Slice) -> Iterator[Document]:
        """The documents of a slice, in the source's fixed order; empty ones may be among them."""
        ...


@dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """What a user says about where documents come from.

    Attributes:
        source: one of ``SOURCE_KINDS``.
        inputs: files, folders or glob patterns; for ``hf`` one dataset name or local folder.
        text_field: the field or column that holds a document's text.
        document_separator: for ``text``, what divides a file into documents; None: a file is a document.
        dataset_config: for ``hf`` and ``fineweb-edu``, the dataset's configuration.
        dataset_split: for ``hf`` and ``fineweb-edu``, the dataset's split.
    """

    source: SourceKind
    inputs: tuple[str, ...] = ()
    text_field: str = "text"
    document_separator: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"


@dataclass(frozen=True)
class _Kind:
    """How a kind of source is opened, and which optional fields of the request it reads."""

    open: Callable[[SourceRequest], Source]
    reads: frozenset[str]


def _open_text(request: SourceRequest) -> Source:
    return TextSource(request.inputs, request.document_separator)


def _open_jsonl(request: SourceRequest) -> Source:
    return JsonlSource(request.inputs, request.text_field)


def _open_instructions(request: SourceRequest) -> Source:
    return InstructionSource(request.inputs)


def _open_parquet(request: SourceRequest) -> Source:
    return ParquetSource(request.inputs, request.text_field)


def _open_hf(request: SourceRequest) -> Source:
    if len(request.inputs) != 1:
        raise DataError(f"--source hf takes one --input, a dataset's name or folder, not {len(request.inputs)}")
    return HuggingFaceSource(
        request.inputs[0],
        config=request.dataset_config,
        split=request.dataset_split,
        text_field=request.text_field,
    )


def _open_fineweb_edu(request: SourceRequest) -> Source:
    return HuggingFaceSource(
        FINEWEB_EDU_DATASET,
        config=request.dataset_config or FINEWEB_EDU_CONFIG,
        split=request.dataset_split,
        text_field=request.text_field,
    )


def _open_standard_library(request: SourceRequest) -> Source:
    return StandardLibrarySource()


_DATASET_FIELDS = frozenset({"text_field", "dataset_config", "dataset_split"})
_KINDS: dict[SourceKind, _Kind] = {
    "text": _Kind(_open_text, frozenset({"inputs", "document_separator"})),
    "jsonl": _Kind(_open_jsonl, frozenset({"inputs", "text_field"})),
    "instructions": _Kind(_open_instructions, frozenset({"inputs"})),
    "parquet": _Kind(_open_parquet, frozenset({"inputs", "text_field"})),
    "hf": _Kind(_open_hf, _DATASET_FIELDS | {"inputs"}),
    "fineweb-edu": _Kind(_open_fineweb_edu, _DATASET_FIELDS),
    "python-stdlib": _Kind(_open_standard_library, frozenset()),
}
SOURCE_KINDS = get_args(SourceKind)


def open_source(request: SourceRequest) -> Source:
    """Open the source of a request; nothing is read from its documents yet.

    Raises:
        DataError: no such kind, an input is missing, does not exist or is not wanted, or an option is set
            that this kind of source does not read.
    """
    if request.source not in _KINDS:
        raise DataError(f"--source {request.source} is not one of {', '.join(SOURCE_KINDS)}")
    kind = _KINDS[request.source]
    for field in fields(SourceRequest):
        is_set = field.name != "source" and getattr(request, field.name) != field.default
        if is_set and field.name not in kind.reads:
            readers = [name for name, other in _KINDS.items() if field.name in other.reads]
            raise DataError(
                f"--source {request.source} takes no {_option(field.name)}; {', '.join(readers)} do"
                if len(readers) > 1
                else f"--source {request.source} takes no {_option(field.name)}; only {readers[0]} does"
            )
    if "inputs" in kind.reads and not request.inputs:
        raise DataError(f"--source {request.source} needs --input")
    return kind.open(request)


def read_documents(source: Source, slice_bytes: int = 1 << 30) -> Iterator[Document]:
    """All documents of a source, one after the other."""
    for part in source.slices(slice_bytes):
        yield from source.read(part)


def _option(field: str) -> str:
    return "--input" if field == "inputs" else "--" + field.replace("_", "-")

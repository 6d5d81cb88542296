"""The kinds of sources by name, the options that each of them reads, and opening one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, get_args

from data_tools.encoding.documents import Document
from data_tools.errors import DataError
from data_tools.options import SourceKind
from data_tools.sources.files import Slice
from data_tools.sources.huggingface import HuggingFaceSource
from data_tools.sources.instructions import InstructionSource
from data_tools.sources.jsonl import JsonlSource
from data_tools.sources.parquet import ParquetSource
from data_tools.sources.standard_library import StandardLibrarySource
from data_tools.sources.text import TextSource

SOURCE_KINDS = get_args(SourceKind)
FINEWEB_EDU_DATASET = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_CONFIG = "sample-10BT"


class Source(Protocol):
    """A repeatable sequence of documents, cut into slices that any process can read by themselves."""

    def options(self) -> dict[str, Any]:
        """Return everything that decides which documents come, as JSON values. Equal options, equal documents."""
        ...

    def text_bytes(self) -> int | None:
        """Return about how many bytes of text the source has, or None if that is not known before reading."""
        ...

    def slices(self, slice_bytes: int) -> list[Slice]:
        """Return consecutive slices, of about ``slice_bytes`` of text where the files allow it."""
        ...

    def read(self, piece: Slice) -> Iterator[Document]:
        """Yield the documents of a slice in the source's fixed order. Some may be empty."""
        ...


@dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """What a user says about where documents come from.

    Attributes:
        source: the kind of source.
        inputs: files, folders or glob patterns; for ``hf`` one dataset name or local folder.
        text_field: the field or column that holds a document's text.
        document_separator: for ``text``, the separator between documents of a file; None if a file is one document.
        dataset_config: for ``hf`` and ``fineweb-edu``, the dataset's configuration.
        dataset_split: for ``hf`` and ``fineweb-edu``, the dataset's split.
    """

    source: SourceKind
    inputs: tuple[str, ...] = ()
    text_field: str = "text"
    document_separator: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"


class _Kind(NamedTuple):
    """How to open a kind of source, and the fields of the request that ``open`` takes as arguments."""

    open: Callable[..., Source]
    reads: tuple[str, ...]


def _open_fineweb_edu(text_field: str, dataset_config: str | None, dataset_split: str) -> Source:
    return HuggingFaceSource((FINEWEB_EDU_DATASET,), text_field, dataset_config or FINEWEB_EDU_CONFIG, dataset_split)


_KINDS: dict[SourceKind, _Kind] = {
    "text": _Kind(TextSource, ("inputs", "document_separator")),
    "jsonl": _Kind(JsonlSource, ("inputs", "text_field")),
    "instructions": _Kind(InstructionSource, ("inputs",)),
    "parquet": _Kind(ParquetSource, ("inputs", "text_field")),
    "hf": _Kind(HuggingFaceSource, ("inputs", "text_field", "dataset_config", "dataset_split")),
    "fineweb-edu": _Kind(_open_fineweb_edu, ("text_field", "dataset_config", "dataset_split")),
    "python-stdlib": _Kind(StandardLibrarySource, ()),
}


def open_source(request: SourceRequest) -> Source:
    """Open the source of a request, without reading its documents.

    Raises:
        DataError: the kind is unknown, an input is missing, does not exist or is not used by this kind of source, or
            an option is set that this kind does not use.
    """
    if request.source not in _KINDS:
        raise DataError(f"--source {request.source} is not one of {', '.join(SOURCE_KINDS)}")
    kind = _KINDS[request.source]
    for field in fields(SourceRequest):
        is_set = field.name != "source" and getattr(request, field.name) != field.default
        if is_set and field.name not in kind.reads:
            readers = [name for name, other in _KINDS.items() if field.name in other.reads]
            others = f"{', '.join(readers)} do" if len(readers) > 1 else f"only {readers[0]} does"
            raise DataError(f"--source {request.source} takes no {_option(field.name)}; {others}")
    if "inputs" in kind.reads and not request.inputs:
        raise DataError(f"--source {request.source} needs --input")
    return kind.open(**{name: getattr(request, name) for name in kind.reads})


def _option(field: str) -> str:
    return "--input" if field == "inputs" else "--" + field.replace("_", "-")

"""Open a source of a given kind. An option that this kind does not use is an error."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, Protocol, get_args

from data_tools.encoding.documents import Document
from data_tools.errors import DataError
from data_tools.options import SourceKind, SourceRequest
from data_tools.sources.files import FileSizes, Slice
from data_tools.sources.huggingface import HuggingFaceSource
from data_tools.sources.instructions import InstructionSource
from data_tools.sources.jsonl import JsonlSource
from data_tools.sources.parquet import ParquetSource
from data_tools.sources.rows import OnBadRow, stop_at_bad_row
from data_tools.sources.standard_library import StandardLibrarySource
from data_tools.sources.text import TextSource

SOURCE_KINDS = get_args(SourceKind)
FINEWEB_EDU_DATASET = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_CONFIG = "sample-10BT"


class Source(Protocol):
    """The interface of a source: documents, divided into slices. A slice has the same documents in every process.

    ``files`` are the path and the size in bytes of each file. It is empty for a dataset on the Hugging Face hub.
    """

    files: FileSizes

    def options(self) -> dict[str, Any]:
        """Return a JSON object with all values that determine which documents the source yields."""
        ...

    def text_bytes(self) -> int | None:
        """Return the approximate size of the text in bytes, or None if all documents must be read to know the size."""
        ...

    def whole_texts(self, count: int, above_bytes: int) -> list[int]:
        """Return the approximate sizes in bytes of the largest files that are held in memory completely.

        The list has at most ``count`` sizes, which are all larger than ``above_bytes``. It is empty if the source
        reads documents one by one. JSON arrays at URLs are left out.
        """
        ...

    def notices(self) -> list[str]:
        """Return messages for the user about the input, for example how many files are skipped."""
        ...

    def slices(self, slice_bytes: int) -> list[Slice]:
        """Divide the source into consecutive slices of about ``slice_bytes`` bytes of text.

        A file that cannot be divided can be a larger slice.
        """
        ...

    def read(self, source_slice: Slice, on_bad_row: OnBadRow = stop_at_bad_row) -> Iterator[Document]:
        """Yield the documents of a slice, always in the same order. Documents may be empty.

        ``on_bad_row`` receives the error for each row that cannot be read. If ``on_bad_row`` returns, the row is
        skipped.
        """
        ...


def _open_fineweb_edu(text_field: str, dataset_config: str | None, dataset_split: str) -> Source:
    return HuggingFaceSource((FINEWEB_EDU_DATASET,), text_field, dataset_config or FINEWEB_EDU_CONFIG, dataset_split)


#: The class for each kind of source. The parameters of its constructor are fields of ``SourceRequest``.
_KINDS: dict[SourceKind, Callable[..., Source]] = {
    "text": TextSource,
    "jsonl": JsonlSource,
    "instructions": InstructionSource,
    "parquet": ParquetSource,
    "hf": HuggingFaceSource,
    "fineweb-edu": _open_fineweb_edu,
    "python-stdlib": StandardLibrarySource,
}


def open_source(request: SourceRequest) -> Source:
    """Open the source that a request selects. Documents are not read yet.

    Raises:
        DataError: the kind of source is unknown, an option does not fit this kind, or an input does not exist.
    """
    if request.source not in _KINDS:
        raise DataError(f"--source {request.source} is not one of {', '.join(SOURCE_KINDS)}")
    fields_of = {kind: inspect.signature(opener).parameters for kind, opener in _KINDS.items()}
    read = fields_of[request.source]
    for field in fields(SourceRequest):
        is_set = field.name != "source" and getattr(request, field.name) != field.default
        if is_set and field.name not in read:
            readers = [kind for kind, names in fields_of.items() if field.name in names]
            others = f"{', '.join(readers)} do" if len(readers) > 1 else f"only {readers[0]} does"
            option = "--input" if field.name == "inputs" else "--" + field.name.replace("_", "-")
            raise DataError(f"--source {request.source} takes no {option}; {others}")
    if "inputs" in read and not request.inputs:
        raise DataError(f"--source {request.source} needs --input")
    return _KINDS[request.source](**{name: getattr(request, name) for name in read})

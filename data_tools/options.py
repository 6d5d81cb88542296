"""Define the options of stage 1 and their allowed values. This module imports no other module of the project."""

from dataclasses import dataclass
from typing import Literal

SourceKind = Literal["text", "jsonl", "instructions", "parquet", "hf", "fineweb-edu", "python-stdlib"]
ShardFormat = Literal["npy", "arrow"]
Deduplication = Literal["off", "exact"]
EncoderChoice = Literal["auto", "gigatoken", "tiktoken"]
BadRows = Literal["stop", "skip"]
Engine = Literal["local", "ray"]
AUTO = "auto"  # recognize the input format by its content
InputFormat = Literal["native", "nanogpt", "llmc", "megatron", "npy"]
OutputFormat = Literal["npy", "arrow", "nanogpt", "llmc"]


@dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """The options that select a source and its documents.

    Attributes:
        inputs: files, folders or glob patterns. For the source ``hf``: the name of one dataset, or one local folder.
        text_field: the field or column with the text of a document.
        document_separator: for the source ``text``, the text between two documents of a file. If None, each file is
            one document.
        dataset_config, dataset_split: the configuration and the split of the dataset, for ``hf`` and ``fineweb-edu``.
    """

    source: SourceKind
    inputs: tuple[str, ...] = ()
    text_field: str = "text"
    document_separator: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"

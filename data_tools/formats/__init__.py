"""Token files of other programs, and folders in our format: inspect and convert them through one interface.

Read and written are nanoGPT's ``train.bin`` and the shards of llm.c and modded-nanogpt; read only is the ``.bin`` with
``.idx`` of Megatron-LM and gpt-neox. ``open_collection`` opens them, ``plan_files`` plans the new files and ``convert``
writes them.
"""

from data_tools.formats.conversion import Conversion, adopt_in_place, convert
from data_tools.formats.inspection import DocumentPreview, FolderReport, SplitReport, first_documents, inspect
from data_tools.formats.opening import AUTO, INPUT_FORMATS, open_collection
from data_tools.formats.plan import DEFAULT_SHARD_TOKENS, OUTPUT_FORMATS, ConvertRequest

__all__ = [
    "AUTO",
    "DEFAULT_SHARD_TOKENS",
    "INPUT_FORMATS",
    "OUTPUT_FORMATS",
    "Conversion",
    "ConvertRequest",
    "DocumentPreview",
    "FolderReport",
    "SplitReport",
    "adopt_in_place",
    "convert",
    "first_documents",
    "inspect",
    "open_collection",
]

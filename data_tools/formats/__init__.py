"""Token files of other programs, and folders of ours, as one kind of thing: look into them, convert them.

Imported and exported are nanoGPT's ``train.bin`` and the shards of llm.c and modded-nanogpt; imported only is the
``.bin`` with ``.idx`` of Megatron-LM and gpt-neox.
"""

from data_tools.formats.conversion import Conversion, convert
from data_tools.formats.detection import AUTO, INPUT_FORMATS, open_collection
from data_tools.formats.in_place import adopt_in_place
from data_tools.formats.inspection import FolderReport, SplitReport, inspect
from data_tools.formats.preview import DocumentPreview, first_documents
from data_tools.formats.request import DEFAULT_SHARD_TOKENS, OUTPUT_FORMATS, ConvertRequest

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

"""Read documents from sources. A source always yields the same documents in the same order."""

from data_tools.options import SourceRequest
from data_tools.sources.files import Slice
from data_tools.sources.registry import SOURCE_KINDS, Source, open_source
from data_tools.sources.rows import BadRowError, OnBadRow, stop_at_bad_row

__all__ = [
    "SOURCE_KINDS",
    "BadRowError",
    "OnBadRow",
    "Slice",
    "Source",
    "SourceRequest",
    "open_source",
    "stop_at_bad_row",
]

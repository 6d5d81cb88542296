"""The sources of documents. Each source always yields the same documents in the same order."""

from data_tools.sources.files import Slice
from data_tools.sources.registry import SOURCE_KINDS, Source, SourceRequest, open_source

__all__ = ["SOURCE_KINDS", "Slice", "Source", "SourceRequest", "open_source"]

"""Datasets of the Hugging Face hub, or local ones, through the library ``datasets``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_tools.errors import DataError
from data_tools.sources.files import describe_files, list_files
from data_tools.sources.jsonl import text_of_record
from data_tools.sources.slices import Slice

# What Dataset.save_to_disk and DatasetDict.save_to_disk leave behind.
_SAVED_DATASET = "state.json"
_SAVED_DATASET_DICT = "dataset_dict.json"
_PARTS_ON_DISK = 64


class HuggingFaceSource:
    """One split of a dataset, streamed: nothing is copied to a cache first."""

    def __init__(self, dataset: str, *, config: str | None, split: str, text_field: str) -> None:
        """Name the dataset: on the hub, or a local folder (data files, or made by ``save_to_disk``)."""
        self._dataset = dataset
        self._config = config
        self._split = split
        self._text_field = text_field

    def options(self) -> dict[str, Any]:
        is_local = os.path.isdir(self._dataset)
        return {
            "dataset": self._dataset,
            "config": self._config,
            "split": self._split,
            "text_field": self._text_field,
            **(describe_files(list_files((self._dataset,), suffixes=()).files) if is_local else {}),
        }

    def text_bytes(self) -> int | None:
        return None

    def slices(self, slice_bytes: int) -> list[Slice]:
        """One a data file of a streamed dataset, and 64 of one on the disk; bytes are not known before."""
        with self._one_line_errors():
            rows = self._open()
            if hasattr(rows, "num_shards"):
                return [Slice(self._dataset, shard, shard + 1) for shard in range(rows.num_shards)]
            bounds = [len(rows) * part // _PARTS_ON_DISK for part in range(_PARTS_ON_DISK + 1)]
            return [Slice(self._dataset, start, stop) for start, stop in pairwise(bounds) if start < stop]

    def read(self, part: Slice) -> Iterator[str]:
        with self._one_line_errors(part):
            rows = self._open()
            if hasattr(rows, "num_shards"):
                rows = rows.shard(num_shards=rows.num_shards, index=part.start)
                first = 0
            else:
                rows, first = rows.select(range(part.start, part.stop)), part.start
            for number, row in enumerate(rows, start=first):
                yield text_of_record(row, self._text_field, f"{part}: row {number}")

    @contextmanager
    def _one_line_errors(self, part: Slice | None = None) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        # The library lets through whatever its file systems and HTTP clients raise, without a common base.
        except Exception as error:
            raise DataError(
                f"cannot read dataset {part or self._dataset} (config {self._config}, split {self._split}): "
                f"{_first_line(error)}"
            ) from error

    def _open(self) -> Any:
        """A ``Dataset`` of a folder that ``save_to_disk`` made, or an ``IterableDataset``, which is streamed."""
        # Imported here because it takes a second, which only this source should cost.
        import datasets

        folder = Path(self._dataset)
        if (folder / _SAVED_DATASET_DICT).is_file():
            splits = datasets.load_from_disk(os.fspath(folder))
            if self._split not in splits:
                raise DataError(f"{folder} has no split {self._split!r}; it has {', '.join(splits)}")
            return splits[self._split]
        if (folder / _SAVED_DATASET).is_file():
            return datasets.load_from_disk(os.fspath(folder))
        return datasets.load_dataset(self._dataset, self._config, split=self._split, streaming=True)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"

"""Datasets of the Hugging Face hub, or local ones, through the library ``datasets``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_tools.errors import DataError
from data_tools.sources.files import describe_files, list_files
from data_tools.sources.jsonl import text_of_record

# What Dataset.save_to_disk and DatasetDict.save_to_disk leave behind.
_SAVED_DATASET = "state.json"
_SAVED_DATASET_DICT = "dataset_dict.json"


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

    def documents(self) -> Iterator[str]:
        number = -1
        try:
            for number, row in enumerate(self._open()):
                yield text_of_record(row, self._text_field, f"{self._dataset}: row {number}")
        except DataError:
            raise
        # The library lets through whatever its file systems and HTTP clients raise, without a common base.
        except Exception as error:
            raise DataError(
                f"cannot read dataset {self._dataset} (config {self._config}, split {self._split}) "
                f"after row {number}: {_first_line(error)}"
            ) from error

    def _open(self) -> Iterable[dict[str, Any]]:
        # Imported here because it takes a second, which only this source should cost.
        import datasets

        folder = Path(self._dataset)
        if (folder / _SAVED_DATASET_DICT).is_file():
            splits = datasets.load_from_disk(os.fspath(folder))
            if self._split not in splits:
                raise DataError(f"{folder} has no split {self._split!r}; it has {', '.join(splits)}")
            rows: Iterable[dict[str, Any]] = splits[self._split]
        elif (folder / _SAVED_DATASET).is_file():
            rows = datasets.load_from_disk(os.fspath(folder))
        else:
            rows = datasets.load_dataset(self._dataset, self._config, split=self._split, streaming=True)
        return rows


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"

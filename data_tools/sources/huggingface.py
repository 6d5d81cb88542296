"""Read datasets from the Hugging Face hub or from a local folder, with the library ``datasets``."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, describe_error, list_names
from data_tools.options import SourceRequest
from data_tools.sources.files import (
    FileSizes,
    Slice,
    describe_files,
    describe_skipped_files,
    find_files,
    find_other_files,
)
from data_tools.sources.jsonl import text_of_record
from data_tools.sources.rows import OnBadRow, parse_rows, stop_at_bad_row
from data_tools.storage.content import require_fetched

_DEFAULT_SPLIT = SourceRequest.dataset_split
# Files that Dataset.save_to_disk and DatasetDict.save_to_disk write.
_SAVED_DATASET = "state.json"
_SAVED_DATASET_DICT = "dataset_dict.json"
# The builder of a dataset with local data files -> the endings of these files.
_ENDINGS = {
    builder: tuple(ending + compression for ending in endings for compression in ("", ".gz", ".zst", ".bz2", ".xz"))
    for builder, endings in {
        "json": (".json", ".jsonl", ".ndjson"),
        "parquet": (".parquet",),
        "csv": (".csv", ".tsv"),
        "text": (".txt",),
        "arrow": (".arrow",),
    }.items()
}


class HuggingFaceSource:
    """One split of a Hugging Face dataset. The documents are not copied to a cache.

    The slices of a dataset on the hub name the commit that was the newest when they were made. An interrupted request,
    and all processes that share a request, therefore read the same documents, also after an update of the dataset.
    """

    def __init__(self, inputs: Sequence[str], text_field: str, dataset_config: str | None, dataset_split: str) -> None:
        """Choose a dataset.

        ``inputs`` has one element: a name on the hub, a folder with data files, or the output of ``save_to_disk``. A
        name can end with ``@`` and a branch, a tag or a commit.
        """
        if len(inputs) != 1:
            raise DataError(f"--source hf takes one --input, a dataset's name or folder, not {len(inputs)}")
        if os.path.isfile(inputs[0]):
            raise DataError(
                f"--source hf takes a dataset's name or folder, and {inputs[0]} is a file; give its folder, or read it "
                "with --source jsonl, parquet or text"
            )
        if inputs[0] in _ENDINGS and not os.path.isdir(inputs[0]):
            raise DataError(f"--source hf: {inputs[0]} is neither a folder here nor a dataset on the hub")
        self._dataset = inputs[0]
        self._text_field = text_field
        self._config = dataset_config
        self._split = dataset_split
        self.files: FileSizes = find_files((self._dataset,), suffixes=()) if self._is_local() else ()

    def options(self) -> dict[str, Any]:
        return {
            "dataset": self._dataset,
            "config": self._config,
            "split": self._split,
            "text_field": self._text_field,
            **(describe_files(self.files) if self._is_local() else {}),
        }

    def text_bytes(self) -> int | None:
        """Return the approximate size of the text in bytes, or None if ``save_to_disk`` did not write the dataset."""
        with self._one_line_errors():
            rows = self._open(self._dataset) if self._is_saved() else None
            return None if rows is None else _text_bytes_of(rows, self._text_field)

    def whole_texts(self, count: int, above_bytes: int) -> list[int]:
        return []

    def notices(self) -> list[str]:
        """Return at most one message about skipped files.

        If a local folder contains several types of files, the library ``datasets`` reads one type and skips the others.
        This method finds the skipped files if the type that the library reads is JSON, Parquet, CSV, text or Arrow.
        """
        if not self._is_local() or self._is_saved():
            return []
        with self._one_line_errors():
            endings = _ENDINGS.get(self._open(self._dataset).info.builder_name)
        others = find_other_files((self._dataset,), endings) if endings else []
        return [describe_skipped_files(others)] if others else []

    def slices(self, slice_bytes: int) -> list[Slice]:
        """Divide the dataset into slices.

        In a dataset that ``save_to_disk`` has written, a slice is a range of rows. Otherwise, a slice is one data file.
        The ``path`` of a slice is the local folder, or the dataset and its commit: ``name@commit``.
        """
        with self._one_line_errors():
            self._require_fetched_files()
            place = self._dataset if self._is_local() else _with_newest_commit(self._dataset)
            rows = self._open(place)
            if not self._is_saved():
                file_bytes = self._mean_file_bytes(rows.num_shards)
                return [Slice(place, shard, shard + 1, file_bytes) for shard in range(rows.num_shards)]
            text_bytes = _text_bytes_of(rows, self._text_field)
            count = min(max(1, -(-text_bytes // slice_bytes)), len(rows))
            bounds = [len(rows) * index // count for index in range(count + 1)] if count else []
            return [Slice(self._dataset, start, stop, text_bytes // count) for start, stop in pairwise(bounds)]

    def read(self, source_slice: Slice, on_bad_row: OnBadRow = stop_at_bad_row) -> Iterator[str]:
        def parse(numbered: tuple[int, dict[str, Any]]) -> str:
            number, row = numbered
            return text_of_record(row, self._text_field, f"{source_slice}: row {number}")

        with self._one_line_errors(source_slice):
            rows = self._open(source_slice.path)
            if not self._is_saved():
                rows = rows.shard(num_shards=rows.num_shards, index=source_slice.start)
                first = 0
            else:
                rows, first = rows.select(range(source_slice.start, source_slice.stop)), source_slice.start
            yield from parse_rows(enumerate(rows, start=first), parse, on_bad_row)

    @contextmanager
    def _one_line_errors(self, source_slice: Slice | None = None) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        # The library raises errors of file systems and HTTP clients, which have no common base class.
        except Exception as error:
            raise DataError(
                f"cannot read dataset {source_slice or self._dataset} (config {self._config}, split {self._split}): "
                f"{describe_error(error)}"
            ) from error

    def _require_fetched_files(self) -> None:
        for path, _ in self.files:
            require_fetched(path)

    def _open(self, place: str) -> Any:
        """Return a ``Dataset`` for a folder that ``save_to_disk`` wrote, otherwise a streamed ``IterableDataset``.

        Args:
            place: the ``path`` of a slice.
        """
        # Import datasets here, because the import takes a second.
        import datasets

        # This logger warns that a README.md has no metadata, which are not needed.
        logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
        if not self._is_saved():
            if self._is_local():
                # The library takes a name such as ``csv`` for a builder, which reads the working directory.
                name, commit = os.path.abspath(place), ""
            else:
                name, _, commit = place.partition("@")
            return datasets.load_dataset(name, self._config, split=self._split, streaming=True, revision=commit or None)
        try:
            saved = datasets.load_from_disk(self._dataset)
        except IndexError as error:
            raise DataError(
                f"{self._dataset}: the dataset or one of its splits has no rows, and the library datasets cannot read "
                "this; save it again without empty splits"
            ) from error
        if not isinstance(saved, datasets.DatasetDict):
            if self._split not in (_DEFAULT_SPLIT, str(saved.split)):
                raise DataError(f"{self._dataset} has no split {self._split!r}: it is one Dataset; leave the split out")
            return saved
        if self._split not in saved:
            raise DataError(
                f"{self._dataset} has no split {self._split!r}; it has {list_names(saved)}; choose one with "
                "--dataset-split"
            )
        return saved[self._split]

    def _is_local(self) -> bool:
        return os.path.isdir(self._dataset)

    def _is_saved(self) -> bool:
        """Return whether the dataset is a folder that ``save_to_disk`` wrote."""
        return any(Path(self._dataset, name).is_file() for name in (_SAVED_DATASET, _SAVED_DATASET_DICT))

    def _mean_file_bytes(self, files: int) -> int | None:
        if not self._is_local():
            return None
        return sum(size for _, size in self.files) // max(files, 1)


def _with_newest_commit(dataset: str) -> str:
    """Return ``name@commit`` for a dataset on the hub. If the library ``datasets`` is offline, return the dataset.

    Args:
        dataset: its name, or ``name@revision``.

    Raises:
        DataError: the dataset does not have the revision.
    """
    # Import both here, because the imports take a second.
    import datasets
    from huggingface_hub import HfApi, errors

    if datasets.config.HF_HUB_OFFLINE:  # it reads its cache
        return dataset
    name, _, revision = dataset.partition("@")
    try:
        return f"{name}@{HfApi().dataset_info(name, revision=revision or None).sha}"
    except errors.RevisionNotFoundError as error:
        raise DataError(f"dataset {name} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError:
        return dataset  # the library datasets explains this error


def _text_bytes_of(rows: Any, text_field: str) -> int:
    """Return the size of a column of a ``Dataset`` in bytes, or 0 if the column is missing."""
    return rows.data.column(text_field).nbytes if text_field in rows.column_names else 0

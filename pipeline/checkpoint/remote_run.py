"""Read and write the checkpoints of a run at a URL, such as ``s3://bucket/run``.

The files have the same names and bytes as in a local run folder. The manifest of a checkpoint is written last and
deleted first, so a checkpoint with a ``manifest.json`` is complete.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_tools.storage.folders import RemoteFolder
from pipeline.checkpoint.json_files import parse_json_object
from pipeline.checkpoint.layout import (
    MANIFEST_FILE,
    STATE_FILE,
    checkpoint_name,
    checkpoint_url,
    parse_step,
    split_url,
)
from pipeline.checkpoint.manifest import CheckpointManifest, FileEntry, check_manifest
from pipeline.checkpoint.state import StateFile, check_state_file
from pipeline.errors import CheckpointError
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER, METRICS_FILE

#: If a run continues from an earlier step, the manifests of later checkpoints get this name.
ABANDONED_MANIFEST = f"{MANIFEST_FILE}.abandoned"


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A checkpoint at a URL. Its manifest was read and checked. Its other files were not read."""

    run: "RemoteRun"
    step: int
    manifest_bytes: bytes
    manifest: CheckpointManifest
    sizes: Mapping[str, int]  # file name -> size in bytes at the URL

    def __str__(self) -> str:
        return self.run.checkpoint_url(self.step)

    @property
    def total_bytes(self) -> int:
        """Return the size of all files except the manifest."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def find_size_damage(self) -> str | None:
        """Return a message about the first file that is missing or has the wrong size, or None."""
        for name, entry in self.manifest.files.items():
            size = self.sizes.get(name)
            if size is None:
                return f"{self}/{name}: missing"
            if size != entry.bytes:
                return f"{self}/{name}: {size} bytes, expected {entry.bytes} bytes"
        return None


class RemoteRun:
    """The folder of a run at a URL.

    All methods raise DataError if the server refuses or does not answer, and CheckpointError if a file is damaged.
    """

    def __init__(self, url: str) -> None:
        self.folder = RemoteFolder(url)
        self.url = self.folder.url

    def checkpoint_url(self, step: int) -> str:
        """Return the URL of the checkpoint of a step. The checkpoint need not exist."""
        return checkpoint_url(self.url, step)

    def list(self) -> dict[int, dict[str, int]]:
        """Return step -> file name -> size in bytes for all checkpoints, including incomplete ones."""
        found: dict[int, dict[str, int]] = {}
        for path, size in self.folder.sizes().items():
            parent, _, rest = path.partition("/")
            folder, _, name = rest.partition("/")
            step = parse_step(folder) if parent == CHECKPOINTS_FOLDER else None
            if step is not None and name:
                found.setdefault(step, {})[name] = size
        return found

    def open(self, step: int, sizes: Mapping[str, int]) -> RemoteCheckpoint:
        """Read and check the manifest of a checkpoint. ``sizes`` are the file sizes that ``list`` returned."""
        content = self._read(step, MANIFEST_FILE)
        return RemoteCheckpoint(self, step, content, self.parse_manifest(step, content), sizes)

    def parse_manifest(self, step: int, content: bytes) -> CheckpointManifest:
        """Check the bytes of the manifest of a checkpoint, and return the manifest. This needs no request."""
        place = f"{self.checkpoint_url(step)}/{MANIFEST_FILE}"
        return check_manifest(parse_json_object(content, place), place)

    def read_state(self, step: int) -> StateFile:
        place = f"{self.checkpoint_url(step)}/{STATE_FILE}"
        return check_state_file(parse_json_object(self._read(step, STATE_FILE), place), place)

    def read_range(self, step: int, name: str, start: int, stop: int) -> bytes:
        """Return bytes ``start`` to ``stop - 1`` of a file of a checkpoint."""
        try:
            content = self.folder.read_range(_prefix(step) + name, start, stop)
        except FileNotFoundError:
            raise CheckpointError(f"{self.checkpoint_url(step)}/{name}: missing") from None
        if len(content) != stop - start:
            raise CheckpointError(f"{self.checkpoint_url(step)}/{name}: ends at byte {start + len(content)}")
        return content

    def upload(self, step: int, path: Path, entry: FileEntry) -> None:
        """Upload a file, read it back, and check that it matches ``entry``, the file's entry in the manifest."""
        name = _prefix(step) + path.name
        self.folder.upload(path, name)
        if self.folder.sha256(name, entry.bytes) != entry.sha256:
            raise CheckpointError(f"{self.url}/{name}: SHA-256 after the upload differs from the manifest")

    def publish(self, step: int, manifest_bytes: bytes, files: Mapping[str, FileEntry]) -> dict[int, dict[str, int]]:
        """Complete a checkpoint: check the sizes of all uploaded files, and write the manifest.

        ``files`` has the manifest's entries by file name. Returns what ``self.list`` returns.
        """
        found = self.list()
        sizes = found.setdefault(step, {})
        for name, entry in files.items():
            if sizes.get(name) != entry.bytes:
                size = sizes.get(name, 0)
                raise CheckpointError(f"{self.checkpoint_url(step)}/{name}: {size} of {entry.bytes} bytes arrived")
        self.folder.write(_prefix(step) + MANIFEST_FILE, manifest_bytes)
        sizes[MANIFEST_FILE] = len(manifest_bytes)
        return found

    def set_aside(self, step: int) -> None:
        """Rename the manifest of a checkpoint, so that no run resumes from this checkpoint."""
        name = _prefix(step) + MANIFEST_FILE
        self.folder.write(_prefix(step) + ABANDONED_MANIFEST, self.folder.read(name))
        self.folder.remove_existing({name})

    def delete(self, step: int, sizes: Mapping[str, int]) -> None:
        """Delete a checkpoint, its manifest first. ``sizes`` are the file sizes that ``list`` returned."""
        if MANIFEST_FILE in sizes:
            self.folder.remove_existing({_prefix(step) + MANIFEST_FILE})
        self.folder.remove_existing({_prefix(step) + name for name in sizes if name != MANIFEST_FILE})

    def write_metrics(self, content: bytes) -> None:
        self.folder.write(METRICS_FILE, content)

    def read_metrics(self) -> bytes | None:
        """Return the content of ``metrics.jsonl``, or None if the file does not exist."""
        try:
            return self.folder.read(METRICS_FILE)
        except FileNotFoundError:
            return None

    def _read(self, step: int, name: str) -> bytes:
        try:
            return self.folder.read(_prefix(step) + name)
        except FileNotFoundError:
            raise CheckpointError(f"{self.checkpoint_url(step)}/{name}: missing") from None


def _prefix(step: int) -> str:
    return f"{CHECKPOINTS_FOLDER}/{checkpoint_name(step)}/"


def parse_url(url: str) -> tuple[RemoteRun, int | None]:
    """Return the run at a URL, and the step in the URL. For the URL of a run, the step is None."""
    run_url, step = split_url(url)
    return RemoteRun(run_url), step

"""Read and write files in a folder that is local or at a URL. A file with its final name is always complete.

Reading a missing file raises ``FileNotFoundError``.
"""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_tools.errors import DataError, one_line_write_errors
from data_tools.storage.atomic import atomic_file, fsync_file, fsync_folder
from data_tools.storage.files import is_remote
from data_tools.storage.remote import find_folder, wait_for_answer

_SCRATCH_PREFIX = ".scratch-"
_READ_BYTES = 32 << 20  # per request, when a whole file at a URL is read


class LocalFolder:
    """A folder on this machine or on a network file system.

    The name of a file may contain a subfolder, such as ``tasks/00000.json``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> set[str]:
        """Return the names of all files in the folder and its subfolders. A missing folder has no files."""
        return {
            Path(parent, name).relative_to(self.path).as_posix()
            for parent, _, names in os.walk(self.path)
            for name in names
        }

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes. If the file does not exist, return None."""
        with one_line_write_errors(self.path / name):
            try:
                return (self.path / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raise FileNotFoundError if it does not exist."""
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file atomically and durably."""
        path = self.path / name
        # Several processes may write the same file, so each process uses a different aside path.
        with one_line_write_errors(path), scratch_of(self) as scratch, atomic_file(path, scratch / path.name) as file:
            file.write(content)
            path.parent.mkdir(exist_ok=True)

    def take(self, scratch: Path, names: Sequence[str]) -> None:
        """Move complete files from a temporary local folder into this folder, in order and each of them atomically.

        The contents of the files are durable before they get their names here. Call ``sync`` to make the names durable.
        """
        for name in names:
            with one_line_write_errors(self.path / name):
                fsync_file(scratch / name)
        for name in names:
            with one_line_write_errors(self.path / name):
                (self.path / name).parent.mkdir(exist_ok=True)
                os.replace(scratch / name, self.path / name)

    def sync(self) -> None:
        """Make the names of all files in the folder durable. Files in subfolders are not included."""
        with one_line_write_errors(self.path):
            fsync_folder(self.path)

    def remove(self, names: set[str]) -> None:
        """Remove the given files if they exist. Also remove subfolders that become empty."""
        if not names:
            return
        with one_line_write_errors(self.path):
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            for folder in self.path.iterdir():
                with suppress(FileNotFoundError):  # another process has also removed the folder
                    if folder.is_dir() and not is_scratch(folder.name) and not any(folder.iterdir()):
                        folder.rmdir()

    def scratch(self) -> Path:
        """Create a temporary local folder for new files, and return its path. The caller must remove it."""
        path = self.path / f"{_SCRATCH_PREFIX}{uuid.uuid4().hex}"
        with one_line_write_errors(path):
            path.mkdir(parents=True)
        return path

    def remove_scratch(self) -> None:
        """Remove temporary folders that killed processes have created with ``scratch`` and left behind."""
        _remove_folders(self.path, _SCRATCH_PREFIX)

    def free_bytes(self) -> int | None:
        """Return the free disk space in bytes, or None if unknown."""
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free


class RemoteFolder:
    """A folder at a URL. It has all methods of ``LocalFolder``.

    In an object store, a file appears only after its upload is complete.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        with self._one_line_errors():
            # A client that caches listings would not see new files of other processes.
            options = {"use_listings_cache": False}
            if self._url.startswith(("file://", "local://")):
                options["auto_mkdir"] = True
            self._files = find_folder(self._url, **options)

    @property
    def url(self) -> str:
        """Return the URL, without a slash at its end."""
        return self._url

    def names(self) -> set[str]:
        return set(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes, by name. If the folder is missing, the result is empty."""
        with self._one_line_errors():
            self._files.invalidate_cache()
            try:
                found = wait_for_answer(self._url, lambda: self._files.find("", detail=True))
            except FileNotFoundError:
                return {}
            return {name: int(info["size"]) for name, info in found.items()}

    def size(self, name: str) -> int | None:
        with self._one_line_errors():
            try:
                return int(wait_for_answer(self._url, lambda: self._files.size(name)))
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes:
        with self._one_line_errors():
            content: bytes = self._files.cat_file(name)
        return content

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes ``start`` to ``stop - 1`` of a file, or fewer if the file is shorter."""
        with self._one_line_errors():
            content: bytes = self._files.cat_file(name, start=start, end=stop)
        return content

    def sha256(self, name: str, size: int) -> str:
        """Return the SHA-256, as 64 hexadecimal digits, of the first ``size`` bytes of a file."""
        digest = hashlib.sha256()
        for start in range(0, size, _READ_BYTES):
            digest.update(self.read_range(name, start, min(start + _READ_BYTES, size)))
        return digest.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        with self._one_line_errors(writes=name):
            self._files.pipe_file(name, content)

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file into the folder, without a check that all bytes have arrived."""
        with self._one_line_errors(writes=name):
            self._files.put_file(str(path), name)

    def take(self, scratch: Path, names: Sequence[str]) -> None:
        for name in names:
            size = (scratch / name).stat().st_size
            self.upload(scratch / name, name)
            with self._one_line_errors():
                self._files.invalidate_cache()
            if self.size(name) != size:
                raise DataError(
                    f"cannot write {self._url}/{name}: {self.size(name)} of {size} bytes arrived; try again"
                )
            (scratch / name).unlink()

    def sync(self) -> None:
        """Do nothing, because an uploaded file is already durable."""

    def remove(self, names: set[str]) -> None:
        with self._one_line_errors():
            for name in names:
                if self._files.exists(name):
                    self._files.rm_file(name)

    def remove_existing(self, names: set[str]) -> None:
        """Remove the given files, which must exist. An object store removes up to 1000 files per request."""
        if names:
            with self._one_line_errors():
                self._files.rm(sorted(names))

    def scratch(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=self._scratch_prefix))

    def remove_scratch(self) -> None:
        _remove_folders(Path(tempfile.gettempdir()), self._scratch_prefix)

    def free_bytes(self) -> int | None:
        return None

    @property
    def _scratch_prefix(self) -> str:
        return f"shards-{hashlib.sha256(self._url.encode()).hexdigest()[:16]}-"

    @contextmanager
    def _one_line_errors(self, writes: str | None = None) -> Iterator[None]:
        """Convert errors of the storage client to ``DataError``. When reading, keep ``FileNotFoundError``."""
        try:
            yield
        except FileNotFoundError as error:
            if writes is None:
                raise
            # The bucket or the folder is missing.
            raise DataError(f"cannot write {self._url}/{writes}: {error}") from error
        except DataError:
            raise
        except Exception as error:  # the errors of the clients have no common base class
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(f"cannot use {self._url}: {type(error).__name__}: {reason}") from error


Folder = LocalFolder | RemoteFolder


def open_folder(place: str | Path) -> Folder:
    """Return an object for the folder at a path or URL. The folder need not exist."""
    return RemoteFolder(str(place)) if is_remote(str(place)) else LocalFolder(Path(place))


def is_scratch(name: str) -> bool:
    """Return whether a name is that of a temporary folder from ``LocalFolder.scratch``."""
    return name.startswith(_SCRATCH_PREFIX)


@contextmanager
def scratch_of(folder: Folder) -> Iterator[Path]:
    """Return a context manager that creates a temporary folder with ``folder.scratch``, and later removes it."""
    path = folder.scratch()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_folders(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*"):
        shutil.rmtree(path, ignore_errors=True)

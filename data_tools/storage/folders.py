"""Where stage 1 writes: a local folder, or one at a URL that fsspec knows. Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import fsspec

from data_tools.errors import DataError, one_line_write_errors
from data_tools.storage.atomic import atomic_file, publish
from data_tools.storage.files import is_remote

_SCRATCH_PREFIX = ".scratch-"


class Folder(Protocol):
    """Named files; a name may have folders in it, as ``tasks/00000.json``."""

    def names(self) -> set[str]:
        """All files; none if the folder does not exist."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: it is not there."""
        ...

    def read(self, name: str) -> bytes:
        """A whole file; ``FileNotFoundError`` if it is not there."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """A whole file, durably and at once."""
        ...

    def take(self, path: Path, name: str) -> None:
        """Move a finished local file in, durably and at once."""
        ...

    def remove(self, names: set[str]) -> None:
        """Files, as far as they are there, and folders that become empty."""
        ...

    def scratch(self) -> Path:
        """A new local folder from which ``take`` is fast; the caller removes it."""
        ...

    def remove_scratch(self) -> None:
        """Whatever killed processes left of ``scratch``."""
        ...

    def free_bytes(self) -> int | None:
        """Room on the disk; None: there is no knowing."""
        ...


class LocalFolder:
    """A folder of this machine, or one that its network shares."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> set[str]:
        return {
            Path(parent, name).relative_to(self.path).as_posix()
            for parent, _, names in os.walk(self.path)
            for name in names
        }

    def size(self, name: str) -> int | None:
        with one_line_write_errors(self.path / name):
            try:
                return (self.path / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self.path / name
        # Several processes may write the same file, so each uses an aside path of its own.
        with one_line_write_errors(path), scratch_of(self) as scratch, atomic_file(path, scratch / path.name) as file:
            file.write(content)
            path.parent.mkdir(exist_ok=True)

    def take(self, path: Path, name: str) -> None:
        with one_line_write_errors(self.path / name):
            publish(path, self.path / name)

    def remove(self, names: set[str]) -> None:
        if not names:
            return
        with one_line_write_errors(self.path):
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            for folder in self.path.iterdir():
                with suppress(FileNotFoundError):  # another process removes it too
                    if folder.is_dir() and not is_scratch(folder.name) and not any(folder.iterdir()):
                        folder.rmdir()

    def scratch(self) -> Path:
        path = self.path / f"{_SCRATCH_PREFIX}{uuid.uuid4().hex}"
        with one_line_write_errors(path):
            path.mkdir(parents=True)
        return path

    def remove_scratch(self) -> None:
        for path in self.path.glob(f"{_SCRATCH_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def free_bytes(self) -> int | None:
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free


class RemoteFolder:
    """A folder at a URL; object stores put a file under its name when all of it has arrived."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        with _one_line_remote_errors(url):
            self._files, self._root = fsspec.core.url_to_fs(self._url)

    def names(self) -> set[str]:
        with _one_line_remote_errors(self._url):
            self._files.invalidate_cache()
            if not self._files.exists(self._root):
                return set()
            return {path[len(self._root) :].lstrip("/") for path in self._files.find(self._root)}

    def size(self, name: str) -> int | None:
        with _one_line_remote_errors(self._url):
            try:
                return int(self._files.size(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes:
        with _one_line_remote_errors(self._url):
            content: bytes = self._files.cat_file(f"{self._root}/{name}")
        return content

    def write(self, name: str, content: bytes) -> None:
        with self._one_line_write_errors(name):
            self._files.pipe_file(f"{self._root}/{name}", content)

    def take(self, path: Path, name: str) -> None:
        size = path.stat().st_size
        with self._one_line_write_errors(name):
            self._files.put_file(str(path), f"{self._root}/{name}")
            self._files.invalidate_cache()
        if self.size(name) != size:
            raise DataError(f"cannot write {self._url}/{name}: {self.size(name)} of {size} bytes arrived; try again")
        path.unlink()

    def remove(self, names: set[str]) -> None:
        with _one_line_remote_errors(self._url):
            for name in names:
                if self._files.exists(f"{self._root}/{name}"):
                    self._files.rm_file(f"{self._root}/{name}")

    def scratch(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=self._scratch_prefix))

    def remove_scratch(self) -> None:
        for path in Path(tempfile.gettempdir()).glob(f"{self._scratch_prefix}*"):
            shutil.rmtree(path, ignore_errors=True)

    def free_bytes(self) -> int | None:
        return None

    @property
    def _scratch_prefix(self) -> str:
        """Tells the scratch folders of this URL from those of others."""
        return f"shards-{hashlib.sha256(self._url.encode()).hexdigest()[:16]}-"

    @contextmanager
    def _one_line_write_errors(self, name: str) -> Iterator[None]:
        try:
            with _one_line_remote_errors(self._url):
                yield
        except FileNotFoundError as error:  # of the bucket, or of the folder where there are folders
            raise DataError(f"cannot write {self._url}/{name}: {error}") from error


def open_folder(place: str | Path) -> LocalFolder | RemoteFolder:
    """The folder at a path or URL; it need not exist."""
    return RemoteFolder(str(place)) if is_remote(str(place)) else LocalFolder(Path(place))


def is_scratch(name: str) -> bool:
    """Whether a file's name says that a task was writing it."""
    return name.startswith(_SCRATCH_PREFIX)


@contextmanager
def scratch_of(folder: Folder) -> Iterator[Path]:
    """A scratch folder that is gone afterwards."""
    path = folder.scratch()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _one_line_remote_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (DataError, FileNotFoundError):
        raise
    # Clients of remote storage raise errors of their own, without a common base.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"cannot use {url}: {type(error).__name__}: {reason}") from error

"""Find the files and folders whose paths are in a run config."""

from pathlib import Path

from data_tools.errors import DataError
from data_tools.storage.files import is_remote
from pipeline.config.schema import Config, RunConfig


def with_working_dir(config: Config) -> Config:
    """Return a copy of a config. If ``run.working_dir`` is null, set it to the current folder."""
    return config.with_run(working_dir=config.run.working_dir or str(Path.cwd()))


def is_same_place(given: str, stored: str, working_dir: str | None) -> bool:
    """Return whether a path or URL of a command and one in a stored config name the same place.

    Args:
        working_dir: ``run.working_dir`` of the stored config. The stored path may be relative to it, or to the current
            folder, because the project may have moved.
    """
    if is_remote(given) or is_remote(stored):
        return given.rstrip("/") == stored.rstrip("/")
    return Path(given).resolve() in (Path(stored).resolve(), Path(working_dir or "", stored).resolve())


def find_path(path: str, run: RunConfig) -> str:
    """Return the path of a file or folder that a config names. A URL is returned unchanged.

    A relative path is searched in the current folder, then in the folder in which the run was started. If both are the
    same folder, the path need not exist.

    Raises:
        DataError: the two folders differ, and neither contains the path.
    """
    if run.working_dir is None or is_remote(path) or Path(path).exists():
        return path
    at_start = Path(run.working_dir, path)
    if at_start.exists():
        return str(at_start)
    if at_start == Path.cwd() / path:
        return path
    raise DataError(
        f"{path}: neither {Path.cwd() / path} nor {at_start} exists; start the command in the folder that has "
        f"{path}, or name another with --set data.path=DIR (evaluate: --data TASK=PATH)"
    )

"""Find the files and folders that a run config names."""

from pathlib import Path

from data_tools.errors import DataError
from data_tools.storage.files import is_remote
from pipeline.config.schema import Config, RunConfig


def with_working_dir(config: Config) -> Config:
    """Return the config of a run that starts in the current folder, unless the config names another folder."""
    run = config.run.model_copy(update={"working_dir": config.run.working_dir or str(Path.cwd())})
    return config.model_copy(update={"run": run})


def find_path(path: str, run: RunConfig) -> str:
    """Return a path of a config that exists, or the path itself if no better one is known.

    A relative path belongs to the current folder. If it is missing there, it belongs to the folder in which the run
    was started, so that a run can be evaluated and continued from any folder.

    Raises:
        DataError: the path is missing in both folders.
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
        f"{path}, or name another with --set data.path=DIR (evaluate.py: --data TASK=PATH)"
    )

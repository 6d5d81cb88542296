"""Find the files and folders whose paths are in a run config."""

from pathlib import Path

from data_tools.errors import DataError
from data_tools.storage.files import is_remote
from pipeline.config.schema import Config, RunConfig


def with_working_dir(config: Config) -> Config:
    """Return a copy of a config. If ``run.working_dir`` is null, it is set to the current folder in the copy."""
    run = config.run.model_copy(update={"working_dir": config.run.working_dir or str(Path.cwd())})
    return config.model_copy(update={"run": run})


def find_path(path: str, run: RunConfig) -> str:
    """Return the path of a file or folder that a config names. A URL is returned unchanged.

    A relative path is first searched in the current folder, and then in the folder in which the run was started.
    Therefore, a run can be evaluated and resumed from any folder. If the run was started in the current folder, the
    path is returned unchanged, even if it does not exist.

    Args:
        path: the path in the config. It may be relative.
        run: the section ``run`` of the config, which contains the folder in which the run was started.

    Raises:
        DataError: the two folders differ, and the path exists in neither of them.
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

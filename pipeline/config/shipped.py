"""Find the run configs in the folder ``ds_configs`` by their names, such as ``zero1``."""

from pathlib import Path

_IN_CHECKOUT = Path(__file__).resolve().parents[2] / "ds_configs"
_IN_WHEEL = Path(__file__).resolve().parent / "shipped"  # setup.py copies the configs into this folder


def shipped_configs() -> dict[str, Path]:
    """Return the paths of the configs in ``ds_configs`` by name, in alphabetical order."""
    folder = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_config(name: str | Path) -> Path:
    """Return the path of a config file.

    Args:
        name: a file, or the name of a config in ``ds_configs``. If neither exists, ``name`` is returned as a path.
    """
    path = Path(name)
    return path if path.is_file() else shipped_configs().get(str(name), path)


def is_shipped_config(name: object) -> bool:
    """Return whether ``find_config`` takes this name for a config in ``ds_configs``."""
    return isinstance(name, str) and not Path(name).is_file() and name in shipped_configs()

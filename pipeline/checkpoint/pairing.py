"""Record in a run folder which URLs belong to the run, in the file ``remote.json``."""

from pathlib import Path
from typing import Any

from data_tools.storage.atomic import write_json_durably
from pipeline.checkpoint.layout import read_json_object
from pipeline.run_folder.layout import REMOTE_FILE


def is_paired(run_folder: Path, url: str) -> bool:
    """Return whether the checkpoints at a URL belong to the run in ``run_folder`` (see ``pair``)."""
    return url.rstrip("/") in _read(run_folder)["urls"]


def pair(run_folder: Path, url: str) -> None:
    """Record that the checkpoints at a URL belong to the run."""
    if not is_paired(run_folder, url):
        record = _read(run_folder)
        _write(run_folder, {**record, "urls": [*record["urls"], url.rstrip("/")]})


def _read(run_folder: Path) -> dict[str, Any]:
    path = run_folder / REMOTE_FILE
    record = read_json_object(path) if path.exists() else {}
    urls = record.get("urls")
    return {"urls": urls if isinstance(urls, list) else []}


def _write(run_folder: Path, record: dict[str, Any]) -> None:
    write_json_durably(run_folder / REMOTE_FILE, record)

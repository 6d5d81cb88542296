"""Record in ``remote.json`` which URLs contain checkpoints of a run.

If a run goes back to an earlier step, its checkpoints of later steps at the URLs become *abandoned*. When the run is
started again, it does not resume from an abandoned checkpoint.
"""

from pathlib import Path
from typing import Any

from data_tools.storage.atomic import write_json_durably
from pipeline.checkpoint.json_files import read_json_object
from pipeline.run_folder.layout import REMOTE_FILE


def is_paired(run_folder: Path, url: str) -> bool:
    """Return whether the checkpoints at a URL belong to the run in ``run_folder``."""
    return url.rstrip("/") in _read(run_folder)["urls"]


def pair(run_folder: Path, url: str) -> None:
    """Record in the run folder that the checkpoints at a URL belong to the run."""
    if not is_paired(run_folder, url):
        record = _read(run_folder)
        _write(run_folder, {**record, "urls": [*record["urls"], url.rstrip("/")]})


def abandon(run_folder: Path, step: int) -> None:
    """Record for all URLs of the run that the checkpoints of ``step`` and of later steps are abandoned.

    Call this function if the run continues from an earlier checkpoint. The function needs no access to the URLs.
    """
    record = _read(run_folder)
    if record["urls"]:
        before = record["abandoned_from"]
        steps = {url: min(step, before.get(url, step)) for url in record["urls"]}
        _write(run_folder, {**record, "abandoned_from": steps})


def is_abandoned(run_folder: Path, url: str, step: int) -> bool:
    """Return whether the checkpoint of ``step`` at a URL is abandoned."""
    first = _read(run_folder)["abandoned_from"].get(url)
    return first is not None and step >= first


def forget_abandoned(run_folder: Path, url: str) -> None:
    """Delete the record of the abandoned checkpoints at a URL.

    Call this function after the manifests of these checkpoints were renamed.
    """
    record = _read(run_folder)
    if record["abandoned_from"].pop(url, None) is not None:
        _write(run_folder, record)


def _read(run_folder: Path) -> dict[str, Any]:
    path = run_folder / REMOTE_FILE
    record = read_json_object(path) if path.exists() else {}
    urls, steps = record.get("urls"), record.get("abandoned_from")
    return {
        "urls": urls if isinstance(urls, list) else [],
        "abandoned_from": steps if isinstance(steps, dict) else {},
    }


def _write(run_folder: Path, record: dict[str, Any]) -> None:
    write_json_durably(run_folder / REMOTE_FILE, record)

"""Read what W&B has written offline: files in the log format of LevelDB that hold records of protobuf."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK_BYTES, BLOCK_HEADER_BYTES, FILE_HEADER_BYTES = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a ``.wandb`` file. A record that a kill cut short ends the file."""
    content = path.read_bytes()
    at, joined = FILE_HEADER_BYTES, b""
    while at + BLOCK_HEADER_BYTES <= len(content):
        left_in_block = BLOCK_BYTES - at % BLOCK_BYTES
        if left_in_block < BLOCK_HEADER_BYTES:
            at += left_in_block
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece = content[at + BLOCK_HEADER_BYTES : at + BLOCK_HEADER_BYTES + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(piece) < length:
            return
        joined = piece if kind in (FULL, FIRST) else joined + piece
        at += BLOCK_HEADER_BYTES + length
        if kind in (FULL, LAST):
            yield Record.FromString(joined)


def _as_dict(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def read_offline_run(run_folder: Path, run_id: str) -> dict[str, Any]:
    """Return the history, config, summary and saved files of a run, from all processes that trained it, in order.

    The history has the rows without the keys that W&B adds, which begin with an underscore.
    """
    found: dict[str, Any] = {"history": [], "config": {}, "summary": {}, "files": set()}
    for path in sorted(run_folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")):
        for record in read_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = _as_dict(record.history.item)
                found["history"].append({key: value for key, value in row.items() if not key.startswith("_")})
            elif kind in ("config", "summary"):
                found[kind].update(_as_dict(getattr(record, kind).update))
            elif kind == "run":
                found["config"].update(_as_dict(record.run.config.update))
            elif kind == "files":
                found["files"].update(file.path for file in record.files.files)
    return found

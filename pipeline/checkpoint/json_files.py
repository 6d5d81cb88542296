"""Read JSON files of a checkpoint. Each error is one line that names the file."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_tools.storage.content import describe_content
from pipeline.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object. Raises CheckpointError if this fails."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {describe_content(path) or f'cannot be read ({error})'}") from None
    return parse_json_object(text, path)


def parse_json_object(text: str | bytes, path: Path | str) -> dict[str, Any]:
    """Parse the text of a JSON object. Raises CheckpointError if this fails. The message begins with ``path``."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {describe_content(path) or f'cannot be read ({error})'}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def malformed_error(path: Path | str, error: ValidationError) -> CheckpointError:
    """Return the error for a file with valid JSON. The message names the first wrong key and what is wrong."""
    mistake = error.errors(include_url=False)[0]
    key = ".".join(map(str, mistake["loc"]))
    return CheckpointError(f"{path}: malformed ({key}: {mistake['msg']})")

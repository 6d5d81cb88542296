"""Upload an export to the Hugging Face hub."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REASONS = {
    401: "the hub does not accept the token; log in again with: hf auth login",
    403: "the token may not write there; use a token with write access, or another name",
}
_LONGEST_REASON = 160


def check_access(name: str) -> None:
    """Check the name and the access token for an upload to the Hugging Face Hub.

    Call this function before the export, which can take long.

    Raises:
        CheckpointError: the name is not ``MODEL`` or ``USER/MODEL``, the access token is missing or rejected, or the
            hub does not answer.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise CheckpointError(
            f"--push-to-hub {name}: not a name of a model; expected MODEL or USER/MODEL of letters, digits, -, _ and ."
        ) from error
    if get_token() is None:
        raise CheckpointError(f"--push-to-hub {name}: no token; log in with: hf auth login, or set HF_TOKEN")
    with _one_line_errors(name) as api:
        api.whoami()


def push_to_hub(export: Path, name: str, *, private: bool) -> str:
    """Upload an exported folder or file, and return the URL of the model on the hub.

    If the hub has no model of this name, the model is created. Uploaded files replace files of the same names.

    Args:
        name: ``MODEL`` or ``USER/MODEL``.

    Raises:
        CheckpointError: the upload fails, or ``private`` is True and the model exists and is public.
    """
    later = f"; the export is in {export}: upload it later with: hf upload {name} {shlex.quote(str(export))}"
    with _one_line_errors(name, later) as api:
        url = api.create_repo(name, private=True if private else None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise CheckpointError(
                f"--push-to-hub {name}: this model exists and is public; leave --private out, make it private on "
                f"the hub, or use another name{later}"
            )
        if export.is_dir():
            api.upload_folder(repo_id=url.repo_id, folder_path=export, commit_message="Upload model")
        else:
            api.upload_file(
                repo_id=url.repo_id,
                path_or_fileobj=export,
                path_in_repo=export.name,
                commit_message=f"Upload {export.name}",
            )
    return str(url)


@contextmanager
def _one_line_errors(name: str, advice: str = "") -> "Iterator[HfApi]":
    """Yield a client of the hub, and convert its errors to CheckpointError."""
    # Imported here because the import is slow and a local export does not need this library.
    from huggingface_hub import HfApi

    try:
        yield HfApi()
    except CheckpointError:
        raise
    except Exception as error:  # the client has dozens of error types: no network, no access, a full quota, ...
        response = getattr(error, "response", None)
        reason = _REASONS.get(getattr(response, "status_code", 0)) or _describe(error)
        raise CheckpointError(f"--push-to-hub {name}: {reason}{advice}") from error


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())[:_LONGEST_REASON]
    return f"the hub cannot be reached or refuses the upload ({type(error).__name__}: {text})"

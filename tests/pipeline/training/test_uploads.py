"""The log says what happened at the URL of the checkpoints."""

from __future__ import annotations

import pytest

from pipeline.checkpoint.mirror import UploadOutcome
from pipeline.training.uploads import log_upload


def test_a_failure_names_the_action_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    outcome = UploadOutcome(5, 1.0, 0, "Connection refused", "compare the run folder with")
    log_upload("s3://bucket/run", outcome, "the next start tries again")
    assert caplog.messages == [
        "cannot compare the run folder with s3://bucket/run: Connection refused; the next start tries again"
    ]

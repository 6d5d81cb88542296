"""Runs upload their checkpoints to a real S3 server on this machine, and continue from there on an empty disk."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import list_checkpoints, step_of
from pipeline.checkpoint.remote_run import RemoteRun
from pipeline.checkpoint.remote_search import find_checkpoints
from pipeline.errors import CheckpointError
from pipeline.run_folder.metrics import read_metrics
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.runs import (
    REPOSITORY,
    TINY_BYTE_RUN,
    Sections,
    curve_of,
    merged,
    read_curve,
    run_ranks,
    train_run,
)
from tests.support.s3_server import S3Server, s3_server

STEPS, SAVED_AT = 12, 6
MANIFEST = "manifest.json"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as serving, pytest.MonkeyPatch.context() as environment:
        for name, value in serving.environment.items():
            environment.setenv(name, value)
        yield serving


def sections(byte_corpus: Path, url: str) -> Sections:
    options = {"every_steps": SAVED_AT, "keep_last": 2, "remote": url}
    return merged(
        TINY_BYTE_RUN,
        {"data": {"path": str(byte_corpus)}, "schedule": {"max_steps": STEPS}, "checkpoint": options},
    )


def complete_steps(url: str) -> list[int]:
    return sorted(step for step, files in RemoteRun(url).list().items() if MANIFEST in files)


def usable_steps(url: str) -> list[int]:
    """Return the steps of the checkpoints that a run or a command would use."""
    try:
        return [checkpoint.step for checkpoint in find_checkpoints(url)]
    except CheckpointError:
        return []


@pytest.fixture(scope="module")
def uploaded(server: S3Server, byte_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a finished run with two ranks, and the URL of its checkpoints."""
    run_folder, url = tmp_path_factory.mktemp("uploaded") / "run", "s3://bucket/runs/a"
    result = train_run("fsdp", run_folder, sections(byte_corpus, url), processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(rf"uploads to {url}: [12], failed uploads: 0\n", result.stdout)
    return run_folder, url


def test_a_run_continues_on_an_empty_disk_with_another_backend_and_world_size(
    server: S3Server, uploaded: tuple[Path, str], byte_corpus: Path, tmp_path: Path
) -> None:
    """The machine was lost after step 6, and the new one has nothing but the config and the data."""
    folder, url = uploaded
    whole = read_curve(folder)
    run = RemoteRun(url)
    assert complete_steps(url)[-1] == STEPS
    for folder_of_step in list_checkpoints(folder):  # a slow upload may have left out step 6
        assert run.open(step_of(folder_of_step), {}).manifest_bytes == (folder_of_step / MANIFEST).read_bytes()
    run.delete(STEPS, run.list()[STEPS])

    before, size = server.sent, run.open(SAVED_AT, run.list()[SAVED_AT]).total_bytes
    continued = curve_of("zero1", tmp_path, sections(byte_corpus, url), 1)

    assert continued.after(SAVED_AT).largest_loss_difference(whole.after(SAVED_AT)) < LOSS_TOLERANCE["fp32"]
    assert continued.losses[:SAVED_AT] == whole.losses[:SAVED_AT], "the metrics were downloaded too"
    assert complete_steps(url) == [SAVED_AT, STEPS]
    uploads = [row["upload_bytes"] for row in read_metrics(tmp_path) if "upload_bytes" in row and row["step"] == STEPS]
    assert len(uploads) == 1
    assert server.sent - before < size + sum(uploads) + 100_000, "downloaded once, and read back once"


def test_the_requests_of_a_checkpoint(server: S3Server, uploaded: tuple[Path, str], tmp_path: Path) -> None:
    """The numbers of docs/checkpoints.md, for two ranks and files of less than 32 MiB."""
    folder, _ = uploaded
    (tmp_path / "checkpoints").mkdir()
    newest = list_checkpoints(folder)[-1]
    (tmp_path / "checkpoints" / newest.name).symlink_to(newest)
    url = "s3://bucket/runs/counted"
    RemoteRun(url).write_metrics(b"")  # at an empty URL, the client asks twice
    server.requests.clear()
    assert upload_once(url, tmp_path) == 0
    assert server.requests == Counter(PUT=2 * 2 + 2, GET=2 * 2 + 1 + 2)


def upload_once(url: str, run_folder: Path) -> int:
    script = REPOSITORY / "tests" / "support" / "mirror_once.py"
    return run_ranks(1, script, [url, str(run_folder), str(run_folder / "pid")]).returncode


def test_a_kill_during_an_upload_leaves_no_checkpoint_that_looks_complete(
    server: S3Server, uploaded: tuple[Path, str], tmp_path: Path
) -> None:
    """The process is killed when the server has received its first, second, third, ... object."""
    folder, _ = uploaded
    (tmp_path / "checkpoints").mkdir()
    newest = list_checkpoints(folder)[-1]
    (tmp_path / "checkpoints" / newest.name).symlink_to(newest)
    url, killed_at = "s3://bucket/runs/killed", 0
    seen: list[str] = []

    def kill(method: str, path: str) -> bool:
        if method == "PUT":
            seen.append(path)
            if len(seen) == killed_at:
                os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        return False

    server.on_request = kill
    try:
        for killed_at in range(1, 7):  # noqa: B007 - ``kill`` reads it
            seen.clear()
            assert upload_once(url, tmp_path) == -signal.SIGKILL
            assert not usable_steps(url) or seen[-1].endswith(MANIFEST)
    finally:
        server.on_request = lambda method, path: False
    assert seen[-1].endswith(MANIFEST), "the manifest is the last object of a checkpoint"
    assert upload_once(url, tmp_path) == 0
    assert usable_steps(url) == [STEPS]


def test_a_server_that_refuses_does_not_stop_the_training(server: S3Server, byte_corpus: Path, tmp_path: Path) -> None:
    """The run ends with an error, because its last checkpoint is not at the URL. The next start uploads it."""
    run_folder, url = tmp_path / "run", "s3://bucket/runs/refused"
    try:
        server.on_request = lambda method, path: method == "PUT"
        result = train_run("fsdp", run_folder, sections(byte_corpus, url), processes=2)
    finally:
        server.on_request = lambda method, path: False
    assert result.returncode == 2, result.stdout + result.stderr
    assert re.search(rf"uploads to {url}: 0, failed uploads: [12345]; the last one failed: ", result.stdout)
    assert read_metrics(run_folder)[-1]["ended"] == "finished"
    assert f"done      {STEPS} steps" in result.stdout
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert errors and errors[0].startswith(f"error: the last checkpoint is not at {url}: ")
    assert "run the same command again to upload it" in errors[0] and "Traceback" not in result.stderr
    assert complete_steps(url) == []

    again = train_run("fsdp", run_folder, sections(byte_corpus, url), processes=2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"uploaded step {STEPS} to {url}: " in again.stdout
    assert complete_steps(url) == [SAVED_AT, STEPS]

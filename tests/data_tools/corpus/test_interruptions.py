"""Kill real processes: the repeated command writes the same bytes, and no other files or processes remain."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_tools.corpus import chunks as chunks_module
from data_tools.corpus.run import TokenizeRequest, tokenize_corpus
from tests.data_tools.conftest import (
    command_line,
    environment,
    json_lines,
    result,
    states,
    varied_documents,
    wait_until,
)

CHUNK_BYTES = 60_000
SHARD_TOKENS = 15_000


@dataclass(frozen=True)
class Corpus:
    """A corpus of about fifty chunks, and the result of an uninterrupted run."""

    path: Path
    whole: dict[str, bytes | str]

    def request(self, out: Path) -> TokenizeRequest:
        """Return a request for this process. It continues a run with the chunks of that run."""
        return TokenizeRequest(
            source="jsonl",
            inputs=(str(self.path),),
            out=out,
            shard_tokens=SHARD_TOKENS,
            val_fraction=0.1,
            workers=1,
        )

    def options(self, out: Path, workers: int) -> list[object]:
        options = ["--input", self.path, "--shard-tokens", SHARD_TOKENS, "--val-fraction", 0.1]
        return ["--source", "jsonl", *options, "--workers", workers, "--out", out]

    def start(self, out: Path, workers: int) -> subprocess.Popen[str]:
        """Start the command in a process and a process group of its own."""
        return subprocess.Popen(
            command_line(*self.options(out, workers), chunk_bytes=CHUNK_BYTES),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("large")
    path = folder / "large.jsonl"
    path.write_bytes(json_lines([f"{index} {text}" for index, text in enumerate(varied_documents(500) * 5)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks_module, "_SMALLEST_CHUNK_BYTES", CHUNK_BYTES)
        manifest = tokenize_corpus(Corpus(path, {}).request(folder / "whole"))
    assert len({shard.file.split("_")[1] for shard in manifest.shards}) > 30
    return Corpus(path, result(folder / "whole"))


def records(out: Path) -> list[Path]:
    return list(out.glob("tasks/*.json"))


def finished_shards(out: Path) -> list[Path]:
    return [out / shard["file"] for path in records(out) for shard in json.loads(path.read_bytes())["shards"]]


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def wait_for_the_end_of(processes: list[psutil.Process]) -> None:
    gone, alive = psutil.wait_procs(processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def workers_of(pid: int) -> Iterator[psutil.Process]:
    """Yield the worker processes, which are children of the fork server."""
    for child in descendants(pid):
        try:
            is_worker = "forkserver" in " ".join(child.cmdline()) and child.ppid() != pid
        except psutil.Error:  # the process has just ended
            continue
        if is_worker:
            yield child


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path, corpus: Corpus) -> None:
    out = tmp_path / "out"
    moments = random.Random(3)
    kept: dict[Path, tuple[int, int]] = {}
    for attempt in range(2):
        with corpus.start(out, workers=2) as process:
            wait_until(lambda: len(records(out)) >= 8 * attempt + 1, process)  # noqa: B023 (called at once)
            time.sleep(moments.uniform(0, 0.05))
            processes = descendants(process.pid)
            process.kill()
            process.wait()
            wait_for_the_end_of(processes)
        assert not (out / "manifest.json").exists(), "the run was complete before it was killed"
        assert kept.items() <= states(finished_shards(out)).items(), "a finished shard was written again"
        kept = states(finished_shards(out))
    tokenize_corpus(corpus.request(out))
    assert kept.items() <= states(out.iterdir()).items(), "a finished shard was written again"
    assert result(out) == corpus.whole


def test_ctrl_c_is_one_line_and_leaves_finished_chunks_only(tmp_path: Path, corpus: Corpus) -> None:
    out = tmp_path / "out"
    with corpus.start(out, workers=2) as process:
        wait_until(lambda: len(records(out)) >= 3, process)
        # On a terminal it reaches the workers as well.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in errors
    finished = finished_shards(out)
    assert {path.name for path in out.iterdir()} == {"plan.json", "tasks", *(path.name for path in finished)}
    kept = states(finished)
    tokenize_corpus(corpus.request(out))
    assert kept.items() <= states(out.iterdir()).items()
    assert result(out) == corpus.whole


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path, corpus: Corpus) -> None:
    out = tmp_path / "out"
    with corpus.start(out, workers=2) as process:
        for finished in (2, 6):
            wait_until(lambda: len(records(out)) >= finished, process)  # noqa: B023 (called at once)
            next(workers_of(process.pid)).kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert result(out) == corpus.whole


#: Workers import the script that started them, and therefore also this defect.
DEADLY = """
import os, signal, sys
from data_tools.corpus import chunks, worker

encode_document = worker.encode_document

def die_of_one_document(encoder, document):
    if document.startswith("1500 "):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_document(encoder, document)

worker.encode_document = die_of_one_document

if __name__ == "__main__":
    chunks._SMALLEST_CHUNK_BYTES = int(sys.argv.pop(1))
    from launch.cli import run_command
    from launch.tokenize_corpus import main
    run_command(main)
"""


def test_a_document_that_kills_every_worker_ends_the_run_with_one_line(tmp_path: Path, corpus: Corpus) -> None:
    out = tmp_path / "out"
    (tmp_path / "deadly.py").write_text(DEADLY)
    ended = subprocess.run(
        [sys.executable, tmp_path / "deadly.py", str(CHUNK_BYTES), *map(str, corpus.options(out, workers=2))],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    message = ended.stderr.splitlines()[-1]
    assert message.startswith("error: the worker process died 3 times at chunk ")
    assert f"({corpus.path}[" in message
    assert "Traceback" not in ended.stderr
    assert records(out)
    assert {path.name for path in out.iterdir()} == {
        "plan.json",
        "tasks",
        *(path.name for path in finished_shards(out)),
    }
    tokenize_corpus(corpus.request(out))
    assert result(out) == corpus.whole


DISK_FULL = """
import resource, runpy, sys
from data_tools.corpus import chunks
chunks._SMALLEST_CHUNK_BYTES = {chunk_bytes}
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
sys.argv = {arguments!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("format", "limit", "finished"), [("npy", 200, False), ("arrow", 90_000, True)])
def test_a_full_disk_is_one_line_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, limit: int, finished: bool
) -> None:
    monkeypatch.setattr(chunks_module, "_SMALLEST_CHUNK_BYTES", CHUNK_BYTES)
    # The first file's shards fit on the disk; the second one's only document has one that does not.
    (tmp_path / "a.jsonl").write_bytes(json_lines(varied_documents(60)))
    (tmp_path / "b.jsonl").write_bytes(json_lines([" word" * 60_000]))
    options = ["--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--format", format, "--val-fraction", 0]
    arguments = command_line("--source", "jsonl", *options, "--workers", 1, "--out", tmp_path / "out")[1:]
    arguments += ["--encoder", "tiktoken"]  # gigatoken writes a temporary file of its own
    ended = subprocess.run(
        [sys.executable, "-c", DISK_FULL.format(limit=limit, chunk_bytes=CHUNK_BYTES, arguments=arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    message = ended.stderr.splitlines()[-1]
    assert message.startswith(f"error: cannot write {tmp_path / 'out'}")
    assert message.endswith(": File too large")
    assert (tmp_path / "out").exists() == finished
    if finished:
        shards = {path.name for path in finished_shards(tmp_path / "out")}
        assert shards
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "tasks", *shards}
    kept = states((tmp_path / "out").glob("train*"))
    for name in ("out", "whole"):
        inputs = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
        tokenize_corpus(
            TokenizeRequest(
                source="jsonl", inputs=inputs, out=tmp_path / name, format=format, val_fraction=0, workers=1
            )
        )
    assert states(kept) == kept
    assert result(tmp_path / "out") == result(tmp_path / "whole")

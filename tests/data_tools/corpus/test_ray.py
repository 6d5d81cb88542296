"""Check that a Ray cluster writes the same bytes as local processes, also if a worker is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_tools.corpus.run import TokenizeRequest, tokenize_corpus
from pipeline.distributed.rendezvous import free_port
from tests.support.runs import REPOSITORY, child_environment

TOKENIZE = REPOSITORY / "launch" / "tokenize_corpus.py"
RAY = Path(sys.executable).parent / "ray"
ENVIRONMENT = {**child_environment(), "RAY_AUTH_MODE": "disabled"}  # whatever token this machine's user has


def shards_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.fixture(scope="module")
def local_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "out"
    tokenize_corpus(TokenizeRequest(source="python-stdlib", out=out, workers=1))
    return shards_in(out)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start a cluster of one machine with ``ray start``, and yield its address."""
    port = free_port()
    start = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    cluster = subprocess.Popen(
        [*start, "--disable-usage-stats"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT, text=True
    )
    try:
        assert cluster.stdout
        assert any("Ray runtime started" in line for line in cluster.stdout), "the cluster did not start"
        yield f"127.0.0.1:{port}"
    finally:
        cluster.terminate()  # this cluster alone: `ray stop` would end every one of this machine
        cluster.wait(60)


def tokenize_on_ray(out: Path, *options: str) -> subprocess.Popen[str]:
    arguments = ["--source", "python-stdlib", "--out", str(out), "--engine", "ray", *options]
    return subprocess.Popen(
        [sys.executable, str(TOKENIZE), *arguments],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_cluster_writes_the_same_bytes(address: str, local_shards: dict[str, bytes], tmp_path: Path) -> None:
    with tokenize_on_ray(tmp_path / "out", "--ray-address", address) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert shards_in(tmp_path / "out") == local_shards


def test_a_killed_worker_is_replaced(address: str, local_shards: dict[str, bytes], tmp_path: Path) -> None:
    """Use tiktoken, which is slow enough that the test can find a worker at work."""
    with tokenize_on_ray(tmp_path / "out", "--ray-address", address, "--encoder", "tiktoken") as process:
        killed = kill_a_busy_worker(tmp_path / "out", process)
        output, _ = process.communicate(timeout=120)
    assert killed
    assert process.returncode == 0, output
    assert shards_in(tmp_path / "out") == local_shards, "same bytes, and nothing else is left"


def kill_a_busy_worker(out: Path, process: subprocess.Popen[str]) -> bool:
    """Kill a Ray worker that has a scratch folder open; return whether there was one."""
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        for worker in psutil.process_iter(["name", "cmdline"]):
            if (worker.info["cmdline"] or [""])[0].startswith("ray::run_chunk") and any(out.glob(".scratch-*/*")):
                worker.kill()
                return True
        time.sleep(0.01)
    return False


def test_without_an_address_a_cluster_is_started_here(local_shards: dict[str, bytes], tmp_path: Path) -> None:
    with tokenize_on_ray(tmp_path / "out", "--workers", "1") as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert shards_in(tmp_path / "out") == local_shards
    assert '"engine": "ray"' in (tmp_path / "out" / "manifest.json").read_text()


def test_no_cluster_at_the_address_is_one_line(tmp_path: Path) -> None:
    with tokenize_on_ray(tmp_path / "out", "--ray-address", "127.0.0.1:1") as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert [line for line in output.splitlines() if "error" in line.lower()] == [output.splitlines()[-1]]
    assert "--ray-address 127.0.0.1:1: cannot be reached" in output
    assert not (tmp_path / "out").exists()

"""Check when the process from which workers are forked starts, and what it loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_tools.corpus import worker_server
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.worker_server import has_large_input, worker_modules, workers_of
from data_tools.encoding.encoders import load_encoder
from data_tools.errors import DataError
from launch import tokenize_corpus
from tests.data_tools.conftest import command_line, environment


def make_request(folder: Path, *inputs: object, **options: Any) -> TokenizeRequest:
    return TokenizeRequest(source="text", inputs=tuple(map(str, inputs)), out=folder / "out", **options)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    return path


def test_only_files_can_be_a_large_input(tmp_path: Path, large: Path) -> None:
    small = tmp_path / "small.txt"
    small.write_text("text")
    assert has_large_input(make_request(tmp_path, small, large))
    for inputs in ([small], [tmp_path, tmp_path / "missing", "s3://bucket/large.txt", tmp_path / "*.txt"]):
        assert not has_large_input(make_request(tmp_path, *inputs))


@pytest.mark.parametrize(("memory_bytes", "workers"), [(64 << 30, 8), (1 << 30, 2), (64 << 20, 1)])
def test_workers_need_not_more_memory_than_available(
    memory_bytes: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_server, "available_cores", lambda: 8)
    monkeypatch.setattr(worker_server, "memory_limit", lambda: memory_bytes)
    assert workers_of(make_request(tmp_path)) == workers
    assert workers_of(make_request(tmp_path, workers=5)) == 5


def test_a_command_with_a_large_input_starts_it_first(
    tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_server(modules: tuple[str, ...]) -> None:
        raise DataError(f"started with {modules}")

    monkeypatch.setattr(worker_server, "start_server", start_server)
    arguments = ["--source", "text", "--input", str(large), "--out", str(tmp_path / "out"), "--workers", "2"]
    monkeypatch.setattr(sys, "argv", ["tokenize_corpus.py", *arguments])
    with pytest.raises(DataError, match="started with .*worker"):
        tokenize_corpus.main()


def loaded_encoders(number: int, report: object) -> int:
    return load_encoder.cache_info().currsize


@pytest.mark.skipif(sys.platform != "linux", reason="only a forkserver shares what it has loaded")
def test_workers_begin_with_a_loaded_encoder(tmp_path: Path) -> None:
    modules = worker_modules(make_request(tmp_path))
    script = tmp_path / "parent.py"
    script.write_text(
        "from data_tools.corpus.parallel import unordered_map\n"
        f"from {__name__} import loaded_encoders\n"
        "if __name__ == '__main__':\n"
        f"    print(*unordered_map(loaded_encoders, range(2), 2, print, {modules}))\n"
    )
    ended = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, text=True)
    assert ended.stdout == "1 1\n", ended.stderr


def test_workers_begin_without_packages_that_they_do_not_need() -> None:
    code = "import sys, data_tools.corpus.warm; print({'pyarrow.compute', 'tqdm'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert ended.stdout == "set()\n", ended.stderr


def test_a_damaged_gigatoken_does_not_disturb_tiktoken(tmp_path: Path) -> None:
    damaged = tmp_path / "packages" / "gigatoken"
    damaged.mkdir(parents=True)
    (damaged / "__init__.py").write_text("raise RuntimeError('damaged')\n")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 1000)
    variables = environment()
    variables["PYTHONPATH"] = f"{damaged.parent}:{variables['PYTHONPATH']}"
    options = ["--input", *tmp_path.glob("*.txt"), "--out", tmp_path / "out", "--workers", 2, "--encoder", "tiktoken"]
    command = command_line("--source", "text", *options, chunk_bytes=1000)
    ended = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr

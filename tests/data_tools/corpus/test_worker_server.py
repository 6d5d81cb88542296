"""Check when the process from which workers are forked starts before the other imports of the command."""

from pathlib import Path

from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.worker_server import has_large_input


def test_only_large_files_start_it_early(tmp_path: Path) -> None:
    def is_large(*inputs: object) -> bool:
        return has_large_input(TokenizeRequest(source="text", inputs=tuple(map(str, inputs)), out=tmp_path / "out"))

    large, small = tmp_path / "large.txt", tmp_path / "small.txt"
    small.write_text("text")
    with large.open("wb") as file:
        file.truncate(16 << 20)
    assert is_large(small, large)
    assert not is_large(small)
    assert not is_large(tmp_path, tmp_path / "missing", "s3://bucket/large.txt", tmp_path / "*.txt")

"""Check that processes with one share each write the same folder, in any order and at the same time."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.corpus import output as output_module
from data_tools.corpus.chunks import plan_chunks
from data_tools.corpus.estimate import Estimate
from data_tools.corpus.run import TokenizeRequest, find_complete, tokenize_corpus, tokenize_share
from data_tools.errors import DataError
from data_tools.shards.contents import Contents
from data_tools.shards.manifest import Manifest, load_manifest
from data_tools.sources import open_source
from data_tools.storage.folders import LocalFolder
from data_tools.storage.locks import LOCK_NAME, lock_folder
from tests.data_tools.conftest import (
    CHUNK_BYTES,
    command_line,
    environment,
    json_lines,
    result,
    states,
    varied_documents,
)

DOCUMENTS = varied_documents(60)
REFUSAL = "is being written by another process; wait for it or end it"
pytestmark = pytest.mark.usefixtures("small_chunks")


def request_for(tmp_path: Path, name: str = "out", **options: Any) -> TokenizeRequest:
    if not (tmp_path / "a.jsonl").exists():
        (tmp_path / "a.jsonl").write_bytes(json_lines(DOCUMENTS))
    settings = {"val_fraction": 0.2, "shard_tokens": 2000, "workers": 1, **options}
    return TokenizeRequest(source="jsonl", inputs=(str(tmp_path / "a.jsonl"),), out=tmp_path / name, **settings)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes | str]:
    tokenize_corpus(request_for(tmp_path, "whole"))
    return result(tmp_path / "whole")


@pytest.mark.parametrize(("shares", "order"), [(1, [0]), (3, [2, 0, 1]), (24, [20, *range(20), *range(21, 24)])])
def test_shares_in_any_order_make_the_same_folder(
    tmp_path: Path, whole: dict[str, bytes | str], shares: int, order: list[int]
) -> None:
    manifests = [tokenize_share(request_for(tmp_path), share, shares) for share in order]
    # If there are more shares than chunks, the last shares have nothing to do.
    complete = [manifest is not None for manifest in manifests]
    assert complete == sorted(complete)
    assert complete[-1]
    assert result(tmp_path / "out") == whole
    assert tokenize_share(request_for(tmp_path), 0, shares) == manifests[-1] == find_complete(request_for(tmp_path))


@pytest.mark.parametrize(("deduplicate", "shares"), [("off", 3), ("exact", 2)])
def test_shares_at_the_same_time_in_processes_of_their_own(tmp_path: Path, deduplicate: str, shares: int) -> None:
    tokenize_corpus(request_for(tmp_path, "whole", deduplicate=deduplicate))
    options = ["--input", tmp_path / "a.jsonl", "--val-fraction", 0.2, "--shard-tokens", 2000, "--workers", 1]
    options += ["--deduplicate", deduplicate, "--out", tmp_path / "out", "--tasks", shares]

    def run_all() -> list[str]:
        processes = [
            subprocess.Popen(
                command_line("--source", "jsonl", *options, "--task", share, chunk_bytes=CHUNK_BYTES),
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for share in range(shares)
        ]
        outputs = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [0] * shares, outputs
        return [output for output, _ in outputs]

    outputs = run_all()
    if not (tmp_path / "out" / "manifest.json").exists():
        assert deduplicate == "exact", "it needs no second round"
        outputs = run_all()
    assert any(f"{tmp_path / 'out'}:\n  split " in output and "\n  train " in output for output in outputs)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_share_that_was_interrupted_continues(tmp_path: Path, whole: dict[str, bytes | str]) -> None:
    class Stop:
        def planned(self, estimate: Estimate) -> None:
            pass

        def progressed(self, progress: Contents) -> None:
            if progress.documents > 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_share(request_for(tmp_path), 0, 2, Stop())
    finished = states((tmp_path / "out").glob("*.npy"))
    assert finished
    assert tokenize_share(request_for(tmp_path), 0, 2) is None
    assert tokenize_share(request_for(tmp_path), 1, 2) is not None
    assert states(finished) == finished
    assert result(tmp_path / "out") == whole


def test_one_process_can_take_over_from_shares_and_the_other_way_round(
    tmp_path: Path, whole: dict[str, bytes | str]
) -> None:
    assert tokenize_share(request_for(tmp_path), 0, 2) is None
    finished = states((tmp_path / "out").glob("*.npy"))
    tokenize_corpus(request_for(tmp_path))
    assert states(finished) == finished
    assert result(tmp_path / "out") == whole


def test_the_number_of_shares_may_change(tmp_path: Path, whole: dict[str, bytes | str]) -> None:
    assert tokenize_share(request_for(tmp_path), 1, 2) is None
    assert tokenize_share(request_for(tmp_path), 0, 3) is None
    assert tokenize_share(request_for(tmp_path), 0, 1) is not None
    assert result(tmp_path / "out") == whole


class Hold:
    """Pauses a run while it is at work."""

    def __init__(self) -> None:
        self.at_work = threading.Event()
        self.go_on = threading.Event()

    def planned(self, estimate: Estimate) -> None:
        pass

    def progressed(self, progress: Contents) -> None:
        self.at_work.set()
        assert self.go_on.wait(60)


@pytest.mark.parametrize("shared", [False, True])
def test_a_whole_run_does_not_share_the_folder(tmp_path: Path, whole: dict[str, bytes | str], shared: bool) -> None:
    hold = Hold()
    request = request_for(tmp_path)
    run = (lambda: tokenize_share(request, 0, 2, hold)) if shared else (lambda: tokenize_corpus(request, hold))
    thread = threading.Thread(target=run)
    thread.start()
    assert hold.at_work.wait(60)
    before = states(path for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(DataError, match=REFUSAL):
        tokenize_corpus(request)
    if not shared:
        with pytest.raises(DataError, match=REFUSAL):
            tokenize_share(request, 1, 2)
    assert states(path for path in (tmp_path / "out").rglob("*")) == before
    if shared:
        assert tokenize_share(request, 1, 2) is None
    hold.go_on.set()
    thread.join(60)
    if shared:
        assert find_complete(request) is not None, "the process that finishes last completes it"
    assert result(tmp_path / "out") == whole


def test_shares_that_plan_at_the_same_time_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes | str]
) -> None:
    """Let two shares find no plan, so that both write one."""
    both_have_planned = threading.Barrier(2, timeout=60)
    take = LocalFolder.take

    def take_together(folder: LocalFolder, path: Path, name: str) -> None:
        if name == output_module.PLAN_NAME:
            both_have_planned.wait()
        take(folder, path, name)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "take", take_together)
        assert run_together(tmp_path, [0, 1]).count(None) == 1
    assert result(tmp_path / "out") == whole


def test_shares_that_end_at_the_same_time_have_one_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes | str]
) -> None:
    both_are_done = threading.Barrier(2, timeout=60)
    complete = output_module.OutputFolder.complete

    def complete_together(output: Any, **options: Any) -> Any:
        both_are_done.wait()
        return complete(output, **options)

    for _ in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(output_module.OutputFolder, "complete", complete_together)
            assert run_together(tmp_path, [0, 1]).count(None) <= 1
        assert result(tmp_path / "out") == whole
        for path in (tmp_path / "out").iterdir():
            path.unlink()


def run_together(tmp_path: Path, shares: list[int]) -> list[Any]:
    """Run the shares in threads, and return what each of them returned."""
    outcomes: list[Any] = []

    def run(share: int) -> None:
        try:
            outcomes.append(tokenize_share(request_for(tmp_path), share, len(shares)))
        except BaseException as error:  # noqa: BLE001 (it is the test's)
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not [outcome for outcome in outcomes if isinstance(outcome, BaseException)], outcomes
    return outcomes


@pytest.mark.parametrize("run", [tokenize_corpus, lambda request: tokenize_share(request, 0, 1)], ids=["run", "share"])
def test_a_folder_that_another_process_completes_meanwhile_is_not_written_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, bytes | str],
    run: Callable[[TokenizeRequest], Manifest | None],
) -> None:
    """Complete the folder just after the run has looked for a manifest."""
    request = request_for(tmp_path)
    load_complete = output_module.load_complete
    finished: dict[Path, tuple[int, int]] = {}

    def complete_after_looking(out: Path, identity: dict[str, Any]) -> Manifest | None:
        found = load_complete(out, identity)
        if not finished:
            with monkeypatch.context() as patch:
                patch.setattr("data_tools.corpus.run.load_complete", load_complete)
                tokenize_corpus(request)
            finished.update(states((tmp_path / "out").iterdir()))
        return found

    with monkeypatch.context() as patch:
        patch.setattr("data_tools.corpus.run.load_complete", complete_after_looking)
        assert run(request) == load_manifest(tmp_path / "out")
    assert states((tmp_path / "out").iterdir()) == finished
    assert result(tmp_path / "out") == whole


def test_an_empty_corpus_leaves_nothing(tmp_path: Path) -> None:
    request = request_for(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(json_lines([""] * 5))
    with pytest.raises(DataError, match="has no document with text in it"):
        tokenize_share(request, 0, 1)
    assert not (tmp_path / "out").exists()


def test_shares_have_as_much_to_do_as_each_other(tmp_path: Path) -> None:
    request = request_for(tmp_path)
    tokenize_share(request, 0, 3)
    chunks = len(plan_chunks(open_source(request), request))
    assert len(list((tmp_path / "out" / "tasks").glob("*.json"))) == -(-chunks // 3)


def test_a_lock_that_a_killed_process_left_is_ignored(tmp_path: Path, whole: dict[str, bytes | str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_NAME).write_bytes(b"not shared")
    assert tokenize_share(request_for(tmp_path), 0, 2) is None
    with lock_folder(tmp_path / "out", shared=True):
        pass
    assert tokenize_share(request_for(tmp_path), 1, 2) is not None
    assert result(tmp_path / "out") == whole

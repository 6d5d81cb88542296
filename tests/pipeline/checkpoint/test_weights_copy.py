"""Commands that read weights copy them from a URL, once per checkpoint, and without the optimizer's state."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from data_tools.errors import DataError, UserError
from pipeline.checkpoint import loading, verification, weights_copy
from pipeline.checkpoint.inspection import CheckpointReport, RunReport, inspect
from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.loading import load_model, load_model_of_main
from pipeline.checkpoint.mirror import Mirror
from pipeline.checkpoint.retention import delete_checkpoint
from pipeline.checkpoint.weights_copy import locate_weights_of
from pipeline.config.loading import dump_config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, ConfigError, MainRankError
from pipeline.interop.weights import locate_weights
from tests.pipeline.checkpoint.conftest import MANIFEST, MOMENTS, STATE, WEIGHTS, make_backend, state_of, train_steps
from tests.pipeline.conftest import largest_file, tiny_config
from tests.support.checkpoints import save_checkpoint

URL = "memory://bucket/run"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Record the names of the files that are read at the URL, and delete the URL at the end."""
    names: list[str] = []
    cat = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        names.append(path.split("/")[-1])
        return cat(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield names
    if fsspec.filesystem("memory").exists("/bucket"):
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture
def run_folder(tmp_path: Path, world: World, read: list[str]) -> Path:
    """Save and upload checkpoints of steps 1 and 2."""
    save(tmp_path, world, 1, 2)
    read.clear()
    return tmp_path


def save(folder: Path, world: World, *steps: int, ema: float | None = None) -> None:
    backend = make_backend(world, seed=1, averaging={"ema": ema})
    config = dump_config(tiny_config(averaging={"ema": ema}))
    for step in steps:
        train_steps(backend, 1, ema_decay=ema)
        save_checkpoint(folder, state_of(backend, step), config, backend, world, 9)
    mirror = Mirror(URL, folder, world, keep_last=9, timeout_s=30)
    mirror.start()
    assert not [outcome for outcome in mirror.finish(lambda: None) if outcome.problem]


def same_weights(place: Path | str, other: Path | str, weights: str = "training") -> bool:
    models = [load_model(each, CPU, weights).model.state_dict() for each in (place, other)]
    return all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@dataclass(frozen=True)
class RankOfTwo(World):
    """One of two ranks. The other rank is only what it has sent."""

    answers: list[Any] = field(default_factory=list)  # of ``call_on_main`` on the main rank
    hash_of_other: str = "0" * 64
    sent: list[Any] = field(default_factory=list)  # to the other rank

    def call_on_main(self, function: Any) -> Any:
        answer = function() if self.is_main else self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def gather(self, item: Any) -> list[Any]:
        self.sent.append(item)
        other = replace(item, weights_sha256=self.hash_of_other)
        return [item, other] if self.is_main else [other, item]


@pytest.mark.parametrize("is_url", [False, True])
def test_all_ranks_load_the_checkpoint_that_the_main_rank_has_chosen(run_folder: Path, is_url: bool) -> None:
    """The main rank has chosen step 1 before the run, which is still training, saved step 2."""
    place = URL if is_url else run_folder
    assert load_model(place, CPU).step == 2
    older = load_model(list_checkpoints(run_folder)[0], CPU)
    second = RankOfTwo(1, 2, 1, CPU, answers=[older.checkpoint, True], hash_of_other=older.weights_sha256)
    loaded = load_model_of_main(place, second)
    assert (loaded.step, loaded.weights_sha256) == (1, older.weights_sha256)
    assert is_url == (loaded.checkpoint != older.checkpoint), "each host has its own copy of the weights at a URL"


def test_hosts_with_different_checkpoints_at_the_same_path_are_an_error(run_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="rank 1 finds other weights at this path than rank 0; name a folder"):
        load_model_of_main(run_folder, RankOfTwo(0, 2, 0, CPU))


@pytest.mark.parametrize("is_gone_for", ["the hashes", "the weights"])
def test_a_checkpoint_that_the_run_deletes_while_it_is_read_is_replaced_by_a_newer_one(
    is_gone_for: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with ``checkpoint.keep_last`` 1: the next save is complete, and the run deletes the checkpoint before it."""
    older, newer = list_checkpoints(run_folder)
    aside = newer.rename(newer.with_name(".newer"))
    module, name = (verification, "find_damage") if is_gone_for == "the hashes" else (loading, "load_weights")
    plain = getattr(module, name)

    def delete_and_read(folder: Path, *arguments: Any) -> Any:
        if folder == older and older.is_dir():
            aside.rename(newer)
            delete_checkpoint(older)
        return plain(folder, *arguments)

    monkeypatch.setattr(module, name, delete_and_read)
    with caplog.at_level(logging.WARNING):
        assert load_model(run_folder, CPU).step == 2
    assert not caplog.messages, "no warning of a damaged checkpoint"
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_model(older, CPU)


def delete_at_url(step: int) -> None:
    fsspec.filesystem("memory").rm(f"/bucket/run/checkpoints/step_{step:08d}", recursive=True)


def test_a_machine_that_cannot_store_the_copy_is_an_error_that_names_the_cure(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a run agree on this error, and not on an OSError."""
    with largest_file(1000), pytest.raises(DataError, match="cannot copy .*step_00000002 to .*: File too large; free"):
        load_model(URL, CPU)
    (run_folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(run_folder / "file"))
    with pytest.raises(DataError, match="Not a directory; .* set XDG_CACHE_HOME to a folder with space"):
        load_model(URL, CPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(run_folder / "cache"))
    assert load_model(URL, CPU).step == 2


def test_a_checkpoint_that_is_deleted_at_the_url_while_it_is_copied_is_replaced(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = weights_copy.download_block

    def delete_and_download(checkpoint: Any, *arguments: Any) -> int:
        if checkpoint.step == 2:
            with suppress(FileNotFoundError):
                delete_at_url(2)
        return plain(checkpoint, *arguments)

    monkeypatch.setattr(weights_copy, "download_block", delete_and_download)
    with caplog.at_level(logging.INFO):
        assert load_model(URL, CPU).step == 1
    assert f"{URL}/checkpoints/step_00000002 was deleted while it was read" in caplog.text


def test_a_checkpoint_that_is_gone_from_the_url_is_chosen_again(run_folder: Path) -> None:
    """The run has deleted step 1 at the URL after the main rank has copied it."""
    older, newest = (load_model(folder, CPU) for folder in list_checkpoints(run_folder))
    delete_at_url(1)
    answers = [older.checkpoint, False, newest.checkpoint, True]
    second = RankOfTwo(1, 2, 1, CPU, answers=answers, hash_of_other=newest.weights_sha256)
    assert load_model_of_main(URL, second).step == 2
    assert [reading.weights_sha256 for reading in second.sent] == [None, newest.weights_sha256]


@pytest.mark.parametrize("is_deleted", [True, False])
def test_if_another_rank_cannot_read_a_url_the_main_rank_chooses_again_only_if_the_checkpoint_is_gone(
    is_deleted: bool, run_folder: Path
) -> None:
    class MainRank(RankOfTwo):
        def gather(self, item: Any) -> list[Any]:
            self.sent.append(item)
            if len(self.sent) > 1:
                return [item, item]
            if is_deleted:
                delete_at_url(2)
            return [item, replace(item, weights_sha256=None, problem="rank 1 on node1: no answer")]

    main = MainRank(0, 2, 0, CPU)
    if is_deleted:
        assert load_model_of_main(URL, main).step == 1
    else:
        with pytest.raises(CheckpointError, match="^rank 1 on node1: no answer$"):
            load_model_of_main(URL, main)


@pytest.mark.parametrize("error", [DataError("no weights"), ConfigError("no weights")])
def test_weights_that_one_rank_cannot_read_are_an_error_on_all_ranks(
    error: UserError, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = load_model(run_folder, CPU)

    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(loading, "locate_weights_of", refuse)
    second = RankOfTwo(1, 2, 1, CPU, answers=[newest.checkpoint, MainRankError("a rank has failed", 2)])
    with pytest.raises(MainRankError):
        load_model_of_main(URL, second)
    assert [reading.problem for reading in second.sent] == [f"rank 1 on {socket.gethostname()}: no weights"]


def test_the_first_rank_of_another_host_verifies_the_files_on_its_disk(run_folder: Path) -> None:
    newest = load_model(run_folder, CPU)
    path = newest.checkpoint / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    second = RankOfTwo(1, 2, 0, CPU, answers=[newest.checkpoint, MainRankError("", 2)])
    with pytest.raises(MainRankError):
        load_model_of_main(run_folder, second)
    [reading] = second.sent
    assert f": {path}: contents changed" in reading.problem
    assert "copy the checkpoint to this host again" in reading.problem


def test_the_other_ranks_of_a_host_do_not_verify_a_checkpoint_again(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = load_model(run_folder, CPU)
    monkeypatch.setattr(weights_copy, "locate_checkpoint", None)
    monkeypatch.setattr(loading, "find_damage", None)
    second = RankOfTwo(1, 2, 1, CPU, answers=[newest.checkpoint, True], hash_of_other=newest.weights_sha256)
    assert load_model_of_main(run_folder, second).step == 2


def test_the_weights_are_read_once(run_folder: Path, read: list[str]) -> None:
    assert same_weights(URL, run_folder)
    assert read.count(WEIGHTS) == read.count(STATE) == 1
    assert MOMENTS not in read
    read.clear()
    assert locate_weights(URL) == locate_weights_of(f"{URL}/") == locate_weights_of(f"{URL}/checkpoints/step_00000002")
    assert not {WEIGHTS, STATE} & set(read)


def test_only_the_newest_copy_is_kept(run_folder: Path) -> None:
    first, second = list_checkpoints(run_folder)
    assert same_weights(f"{URL}/checkpoints/{first.name}", first)
    assert not same_weights(f"{URL}/checkpoints/{first.name}", second)
    copy = locate_weights_of(URL)
    assert list_checkpoints(copy.parent.parent) == [copy]


def test_the_average_of_the_weights(tmp_path: Path, world: World) -> None:
    """It is in the same files as the moments, so everything is copied."""
    save(tmp_path, world, 1, ema=0.5)
    assert same_weights(URL, tmp_path, "ema")


def test_a_damaged_checkpoint_is_skipped(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = "/bucket/run/checkpoints/step_00000002"
    files = fsspec.filesystem("memory")
    files.pipe_file(f"{newest}/{WEIGHTS}", files.cat_file(f"{newest}/{WEIGHTS}")[:-1] + b"?")
    with caplog.at_level(logging.WARNING):
        assert locate_weights_of(URL).name == "step_00000001"
    assert f"skipping a damaged checkpoint: {URL}/checkpoints/step_00000002/{WEIGHTS}: contents changed" in caplog.text
    with pytest.raises(CheckpointError, match="memory://bucket/other: no checkpoint here"):
        locate_weights_of("memory://bucket/other")


def test_inspecting_a_url_reads_only_json(run_folder: Path, read: list[str]) -> None:
    fsspec.filesystem("memory").pipe("/bucket/run/checkpoints/step_00000003/" + WEIGHTS, b"half")
    there, here = inspect(URL), inspect(run_folder)
    assert isinstance(there, RunReport) and isinstance(here, RunReport)
    assert [(report.bytes, report.contents, report.problem) for report in there.checkpoints] == [
        (report.bytes, report.contents, report.problem) for report in here.checkpoints
    ]
    assert [str(folder.path) for folder in there.leftovers] == [f"{URL}/checkpoints/step_00000003"]
    assert set(read) == {MANIFEST, STATE}
    one = inspect(f"{URL}/checkpoints/step_00000001")
    assert isinstance(one, CheckpointReport) and str(one).startswith(f"{URL}/checkpoints/step_00000001\n")
    fsspec.filesystem("memory").pipe("/bucket/run/checkpoints/step_00000001/" + MOMENTS, b"half")
    damaged = inspect(f"{URL}/checkpoints/step_00000001")
    assert isinstance(damaged, CheckpointReport) and damaged.problem and MOMENTS in damaged.problem

"""A run that is still training deletes the checkpoint that another command reads."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.shards.contents import gpt2_tokenizer_record
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import conversion, pieces
from pipeline.checkpoint.conversion import convert_checkpoint
from pipeline.checkpoint.layout import checkpoint_folder, list_checkpoints, step_of
from pipeline.checkpoint.retention import delete_checkpoint
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, MainRankError
from pipeline.interop import gguf_file
from pipeline.interop.gguf_file import export_gguf
from pipeline.interop.hugging_face import exporting
from pipeline.interop.hugging_face.exporting import export_checkpoint
from pipeline.model.gpt2 import GPT2, allocate_model
from pipeline.training.initial_weights import find_initial_weights, write_initial_weights
from tests.pipeline.checkpoint.conftest import edit_state
from tests.pipeline.conftest import tiny_config
from tests.pipeline.interop.hugging_face.conftest import random_text_model, save_in_pieces, text_config

ALONE = World(0, 1, 0, torch.device("cpu"))

READERS: dict[str, tuple[Any, Callable[[Path, Path], object]]] = {
    "export": (exporting, lambda run, out: export_checkpoint(run, out, "float32")),
    "gguf": (gguf_file, lambda run, out: export_gguf(run, out, "float32")),
    "convert": (conversion, convert_checkpoint),
}


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_text_model(text_config())


@pytest.fixture
def run(model: GPT2, tmp_path: Path) -> Path:
    """Return a run with one checkpoint. The next one is saved by ``save_and_delete``."""
    folder = save_in_pieces(model, text_config(tmp_path / "run"), tmp_path / "run")
    newer = list_checkpoints(folder)[0]
    shutil.copytree(newer, checkpoint_folder(folder, 1))
    newer.rename(newer.with_name(".newer"))
    return folder


def save_and_delete(run: Path) -> None:
    """Complete the next checkpoint of the run, and delete the one before, as with ``checkpoint.keep_last`` 1."""
    older = checkpoint_folder(run, 1)
    if older.exists():
        older.with_name(".newer").rename(checkpoint_folder(run, 2))
        delete_checkpoint(older)


def interrupt(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, run: Path) -> None:
    """Let the run delete the checkpoint right before the first call of a function."""
    plain = getattr(module, name)

    def call(*arguments: Any, **options: Any) -> Any:
        save_and_delete(run)
        return plain(*arguments, **options)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("moment", ["read_state", "read_parameter"])
@pytest.mark.parametrize("reader", READERS)
def test_a_command_reads_the_newest_checkpoint_instead(
    reader: str, moment: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    module, read = READERS[reader]
    interrupt(monkeypatch, module, moment, run)
    with caplog.at_level(logging.INFO):
        read(run, tmp_path / "out")
    assert (tmp_path / "out").exists() and [step_of(folder) for folder in list_checkpoints(run)] == [2]
    assert f"{checkpoint_folder(run, 1)} was deleted while it was read" in caplog.text


def test_a_named_checkpoint_that_is_gone_is_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, exporting, "read_parameter", run)
    with pytest.raises(CheckpointError, match="step_00000001: no checkpoint here.* does not exist"):
        export_checkpoint(checkpoint_folder(run, 1), tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_damage_is_an_error_and_not_read_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove_weights(*_: Any) -> Any:
        raise CheckpointError("the disk has failed")

    monkeypatch.setattr(exporting, "read_parameter", remove_weights)
    with pytest.raises(CheckpointError, match="the disk has failed"):
        export_checkpoint(run, tmp_path / "out", "float32")


@pytest.mark.parametrize("after", ["the search", "some parameters"])
def test_a_new_run_starts_from_the_newest_weights_instead(
    after: str, run: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config().model_copy(update={"checkpoint": tiny_config(checkpoint={"init_from": str(run)}).checkpoint})
    place = find_initial_weights(config)
    assert place == checkpoint_folder(run, 1)
    if after == "the search":
        save_and_delete(run)
    else:
        opened = []
        plain = pieces.safe_open

        def safe_open(path: Path, **options: Any) -> Any:
            opened.append(path)
            if len(opened) > 1:
                save_and_delete(run)
            return plain(path, **options)

        monkeypatch.setattr(pieces, "safe_open", safe_open)
    backend = DdpBackend(allocate_model(config.model, "meta"), config, ALONE)
    origin = write_initial_weights(place, config, backend, gpt2_tokenizer_record(), ALONE)
    assert origin is not None and origin["path"] == str(checkpoint_folder(run, 2).resolve())
    for name, weight in model.named_parameters():
        assert torch.equal(backend.model.get_parameter(name), weight), name


def test_all_ranks_raise_the_error_of_another_rank(run: Path) -> None:
    class MainRank(World):
        def gather(self, item: Any) -> list[Any]:
            return [item, "rank 1 on node1: the disk is full"]

        def call_on_main(self, function: Any) -> Any:
            return function()

    config, main = text_config(), MainRank(0, 2, 0, ALONE.device)
    backend = DdpBackend(allocate_model(config.model, "meta"), config, ALONE)
    with pytest.raises(CheckpointError, match="^rank 1 on node1: the disk is full$"):
        write_initial_weights(checkpoint_folder(run, 1), config, backend, gpt2_tokenizer_record(), main)


def test_a_rank_with_other_weights_at_the_url_tells_the_other_ranks(run: Path) -> None:
    """The rank still takes part in the collective call of ``write_weights``, in which the other ranks wait."""

    class SecondRank(World):
        def gather(self, item: Any) -> list[Any]:
            sent.append(item)
            return [None, item]

        def call_on_main(self, function: Any) -> Any:
            raise MainRankError("a rank has failed", 2)

    sent: list[str] = []
    folder = checkpoint_folder(run, 1)
    edit_state(folder, lambda state: state["config"]["model"].update(n_layer=-2))
    config, second = text_config(), SecondRank(1, 2, 1, ALONE.device)
    backend = DdpBackend(allocate_model(config.model, "meta"), config, ALONE)
    with pytest.raises(MainRankError):
        write_initial_weights(folder, config, backend, gpt2_tokenizer_record(), second)
    assert re.match(r"rank 1 on \S+: .*n_layer", sent[0])

"""A new run starts from the weights of another one, on other data and in another context, under every backend."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.shards.manifest import TokenizerRecord, other_tokenizer
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.loading import load_model
from pipeline.config.loading import dump_config
from pipeline.config.schema import CheckpointConfig
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.interop.hugging_face.exporting import export_checkpoint
from pipeline.interop.weights import open_weights
from pipeline.model.gpt2 import GPT2, allocate_model
from pipeline.run_folder.metrics import read_metrics
from pipeline.training.initial_weights import copy_positions, find_initial_weights, load_initial_weights
from tests.pipeline.checkpoint.conftest import make_backend, state_of
from tests.pipeline.conftest import tiny_config
from tests.pipeline.interop.test_nanogpt import NanoRun
from tests.support.agreement import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE
from tests.support.checkpoints import save_checkpoint
from tests.support.runs import TINY_BYTE_RUN, Curve, Sections, copy_with_masks, curve_of, merged, read_curve, train_run

CONTEXT = TINY_BYTE_RUN["model"]["context_length"]
LONGER = 2 * CONTEXT


@pytest.fixture(scope="module")
def pretrained(byte_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of 6 steps under FSDP on two ranks. Tests must not change it."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    curve_of(
        "fsdp", folder, merged(TINY_BYTE_RUN, {"data": {"path": str(byte_corpus)}, "schedule": {"max_steps": 6}}), 2
    )
    return folder


@pytest.fixture(scope="module")
def answers(byte_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return other data than the pretrained run's: with a loss mask, like instructions."""
    return copy_with_masks(byte_corpus, tmp_path_factory.mktemp("answers") / "data")


@pytest.fixture(scope="module")
def tuning(pretrained: Path, answers: Path) -> Sections:
    """Return a run on the other data, in a longer context, from the pretrained weights."""
    sections: Sections = {
        "model": {"context_length": LONGER},
        "data": {"path": str(answers)},
        "schedule": {"max_steps": 6},
        "checkpoint": {"init_from": str(pretrained)},
    }
    return merged(TINY_BYTE_RUN, sections)


@pytest.fixture(scope="module")
def reference(tuning: Sections, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Curve]:
    folder = tmp_path_factory.mktemp("reference") / "run"
    return folder, curve_of("ddp", folder, tuning)


@pytest.mark.parametrize(
    ("backend", "processes"), [("ddp", 2), ("fsdp", 2), ("zero0", 2), ("zero1", 1), ("zero2", 2), ("zero3", 2)]
)
def test_every_backend_has_the_curve_of_the_reference(
    backend: str, processes: int, tuning: Sections, reference: tuple[Path, Curve], tmp_path: Path
) -> None:
    curve = curve_of(backend, tmp_path / "run", tuning, processes)
    assert curve.largest_loss_difference(reference[1]) <= LOSS_TOLERANCE["fp32"]
    assert curve.largest_grad_norm_difference(reference[1]) <= GRAD_NORM_TOLERANCE


def test_the_record_says_where_the_weights_come_from(reference: tuple[Path, Curve], pretrained: Path) -> None:
    first = next(row for row in read_metrics(reference[0]) if "started" in row)
    assert first["step"] == 0
    last = list_checkpoints(pretrained)[-1]
    assert first["started"]["init_from"] == {"path": str(last.resolve()), "step": 6}


def test_it_starts_below_random_weights(reference: tuple[Path, Curve], pretrained: Path) -> None:
    assert reference[1].losses[0] < read_curve(pretrained).losses[0] - 0.3


def test_the_run_continues_itself_and_does_not_start_again(
    tuning: Sections, reference: tuple[Path, Curve], pretrained: Path, tmp_path: Path
) -> None:
    whole = reference[1]
    curve_of("ddp", tmp_path / "run", merged(tuning, {"checkpoint": {"every_steps": 3}, "schedule": {"max_steps": 6}}))
    for folder in list_checkpoints(tmp_path / "run")[1:]:
        folder.rename(folder.with_name("step_00000006.abandoned"))
    assert curve_of("ddp", tmp_path / "run", tuning).losses == whole.losses
    other = train_run("ddp", tmp_path / "run", merged(tuning, {"checkpoint": {"init_from": str(tmp_path)}}))
    assert other.returncode == 2
    assert f"belongs to a run that started from {pretrained}, and checkpoint.init_from is {tmp_path}" in other.stderr


def test_other_data_on_resume_name_the_way(tuning: Sections, pretrained: Path, tmp_path: Path) -> None:
    """The advice of the refusal, followed, trains."""
    continuing = merged(tuning, {"checkpoint": {"init_from": None}, "model": {"context_length": CONTEXT}})
    refused = train_run("ddp", pretrained, merged(continuing, {"schedule": {"max_steps": 9}}))
    assert refused.returncode == 2
    assert "or start a new run from its weights with --init-from" in refused.stderr
    named = refused.stderr.split("--init-from ")[1].split()[0]
    curve_of("ddp", tmp_path / "run", merged(continuing, {"checkpoint": {"init_from": named}}))


def load(path: Path, **sizes: Any) -> tuple[GPT2, dict[str, Any]]:
    """Load weights into a new model. Returns the model, and the record of where the weights come from."""
    config = tiny_config(model=sizes)
    backend = DdpBackend(allocate_model(config.model, "meta"), config, World(0, 1, 0, torch.device("cpu")))
    origin = load_initial_weights(path, backend, gpt2_tokenizer_record())
    return backend.model, origin


def find(path: Path, **sizes: Any) -> Path:
    found = find_initial_weights(tiny_config(model=sizes, checkpoint={"init_from": str(path)}))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT2]:
    """Return a file of nanoGPT, and its model as imported."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.save(NanoRun().content(), folder / "ckpt.pt")
    model, _ = load(find(folder / "ckpt.pt"))
    return folder / "ckpt.pt", model


def test_weights_of_nanogpt_and_hugging_face(foreign: tuple[Path, GPT2], tmp_path: Path) -> None:
    from pipeline.interop.nanogpt import import_nanogpt

    path, model = foreign
    import_nanogpt(path, tmp_path / "imported")
    expected = load_model(tmp_path / "imported", torch.device("cpu")).model
    exported = export_checkpoint(tmp_path / "imported", tmp_path / "exported", "float32").path
    again, origin = load(find(exported))
    assert origin == {"path": str(exported), "step": None}
    for name, parameter in expected.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter), name
        assert torch.equal(dict(again.named_parameters())[name], parameter), name


def test_a_longer_context_repeats_the_positions_and_a_shorter_one_cuts_them(
    foreign: tuple[Path, GPT2], caplog: pytest.LogCaptureFixture
) -> None:
    path, model = foreign
    stored = model.wpe.weight.detach()
    source = open_weights(path)
    elements = torch.cat([stored, stored, stored[:6]]).view(-1).tensor_split(4)
    for rank in range(4):  # ranges begin and end within rows
        found = torch.empty_like(elements[rank])
        copy_positions(source, sum(map(len, elements[:rank])), found)
        assert torch.equal(found, elements[rank])
    for context_length, note in (
        (30, "positions: 12 there, 30 here; position i starts as position i mod 12"),
        (5, "positions: the first 5 of 12 are kept"),
    ):
        with caplog.at_level(logging.INFO):
            other, _ = load(path, context_length=context_length, reset_positions_at=88)
        assert note in caplog.text
        assert "model.reset_positions_at: None there, 88 here" in caplog.text
        tokens = torch.arange(5)[None]
        with torch.no_grad():
            assert torch.equal(other.eval().logits(tokens), model.eval().logits(tokens))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_head": 7}, "have n_head 3, and this run's model has n_head 7; add --set model.n_head=3"),
        ({"n_layer": 1, "n_embd": 24}, "n_layer 2, n_embd 21, and .*; add --set model.n_layer=2 model.n_embd=21"),
        ({"vocab_size": 100}, "vocab_size 89, and .* vocab_size 100"),
    ],
)
def test_another_size_is_refused_with_the_settings(
    sizes: dict[str, int], message: str, foreign: tuple[Path, GPT2]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        find(foreign[0], **sizes)


def test_paths_without_weights_are_refused(tmp_path: Path) -> None:
    for name, message in ((".", "no checkpoint here"), ("openai-community/gpt2", "gpt2-pipeline export --from-hf")):
        with pytest.raises(CheckpointError, match=message):
            find(tmp_path / name)
    with pytest.raises(ValueError, match=r"resume \(a\) and init_from \(b\) are both given"):
        CheckpointConfig(resume="a", init_from="b")


def test_all_ranks_start_from_the_same_checkpoint_at_a_url(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run at the URL saves and deletes checkpoints after the main rank has chosen one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    backend, url = make_backend(world, seed=1), f"file://{tmp_path}/run"

    def save(step: int, keep_last: int) -> None:
        state = state_of(backend, step)
        save_checkpoint(tmp_path / "run", state, dump_config(tiny_config()), backend, world, keep_last)

    save(1, keep_last=2)
    place = find_initial_weights(tiny_config(checkpoint={"init_from": url}))
    assert place == f"{url}/checkpoints/step_00000001"
    save(2, keep_last=2)
    assert load_initial_weights(place, backend, gpt2_tokenizer_record()) == {"path": place, "step": 1}
    save(3, keep_last=1)
    with pytest.raises(CheckpointError, match="step_00000001: no checkpoint here"):
        load_initial_weights(place, backend, gpt2_tokenizer_record())


@pytest.mark.parametrize(
    ("stored", "is_another"),
    [
        (gpt2_tokenizer_record(), True),
        (TokenizerRecord("mine", 89, 88, "1" * 64), True),
        (TokenizerRecord("mine too", 89, 88, "2" * 64), False),
        (other_tokenizer(89), False),
        (None, False),
    ],
)
def test_a_change_of_the_tokenizer_is_a_warning(
    stored: TokenizerRecord | None, is_another: bool, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_backend(world, seed=1)
    state = replace(state_of(backend, 1), tokenizer=stored)
    folder = save_checkpoint(tmp_path / "run", state, dump_config(tiny_config()), backend, world, 1)
    load_initial_weights(folder, backend, TokenizerRecord("yours", 89, 88, "2" * 64))
    assert ("were trained on tokens of the tokenizer" in caplog.text) == is_another

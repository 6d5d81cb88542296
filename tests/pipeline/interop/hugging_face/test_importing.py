"""A folder of ``transformers`` is imported with the same weights, and anything but GPT-2 is rejected."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.checkpoint.loading import LoadedModel, load_model
from pipeline.checkpoint.state import read_state
from pipeline.config.loading import load_config
from pipeline.errors import CheckpointError
from pipeline.interop.hugging_face.exporting import export_checkpoint
from pipeline.interop.hugging_face.importing import find_folder, import_folder, read_folder
from pipeline.model.gpt2 import GPT2
from tests.pipeline.conftest import largest_file, random_tokens

W = "model.safetensors"
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 89}


def imported(folder: Path | str, run_folder: Path) -> LoadedModel:
    import_folder(str(folder), run_folder)
    return load_model(run_folder, torch.device("cpu"))


def assert_same(model: GPT2, other: GPT2) -> None:
    theirs = dict(other.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in model.named_parameters())


def test_export_and_import_are_the_identity(text_model: GPT2, exported: Path, tmp_path: Path) -> None:
    loaded = imported(exported, tmp_path / "run")
    assert_same(loaded.model, text_model)
    assert loaded.step == 0
    again = export_checkpoint(tmp_path / "run", tmp_path / "again", "float32").path
    assert (again / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_the_run_starts_at_step_0(exported: Path, tmp_path: Path) -> None:
    conversion = import_folder(str(exported), tmp_path / "run")
    state, _ = read_state(conversion.saved.folder)
    assert (state.step, state.samples, state.tokens, state.updates) == (0, 0, 0, 0)
    moments = load_file(conversion.saved.folder / "rank_00000_moments.safetensors")
    assert not any(tensor.any() for tensor in moments.values())
    config = load_config([str(tmp_path / "run" / "config.json")], [])
    assert (config.run.name, config.run.out_dir) == (exported.name, str(tmp_path / "run"))
    assert (config.model.n_embd, config.model.context_length, config.model.vocab_size) == (24, 256, 50257)
    assert "step 0: " in str(conversion)


def test_a_model_that_transformers_saved_in_shards(theirs: Any, text_model: GPT2, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same(imported(tmp_path / "shards", tmp_path / "run").model, text_model)


def as_openai_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as in openai-community/gpt2: no prefix, with the causal masks, no output layer."""
    bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    return {**bare, **masks, "h.0.attn.masked_bias": torch.tensor(-1e4)}


def test_older_names_and_files(exported: Path, text_model: GPT2, tmp_path: Path) -> None:
    tensors = as_openai_published(load_file(exported / "model.safetensors"))
    for name in ("safe", "archive", "legacy"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(exported / "config.json", folder)
        if name == "safe":
            save_file(tensors, folder / "model.safetensors")
        else:
            head = {"lm_head.weight": tensors["wte.weight"]}
            torch.save(
                {**tensors, **head}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=name == "archive"
            )
        assert_same(imported(folder, tmp_path / f"run_{name}").model, text_model)


def test_half_precision_becomes_fp32(run_folder: Path, text_model: GPT2, tmp_path: Path) -> None:
    folder = export_checkpoint(run_folder, tmp_path / "out", "bfloat16").path
    model = imported(folder, tmp_path / "run").model
    assert model.wpe.weight.dtype == torch.float32
    assert torch.equal(model.wpe.weight, text_model.wpe.weight.to(torch.bfloat16).float())


def test_logits_of_their_model_are_ours(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, resid_pdrop=0.0)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    conversion = import_folder(str(tmp_path / "theirs"), tmp_path / "run")
    assert "are [0.0, 0.1, 0.1], here it is one number; set to 0" in str(conversion)
    model = load_model(tmp_path / "run", torch.device("cpu")).model
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def resized(exported: Path, folder: Path, rows: int) -> Path:
    """Copy a folder, with rows of ones after the vocabulary's, as ``resize_token_embeddings`` leaves it."""
    shutil.copytree(exported, folder)
    setting("vocab_size", rows)(folder)
    weights = load_file(folder / "model.safetensors")
    added = torch.ones(rows - 50257, weights["transformer.wte.weight"].shape[1])
    save_file({**weights, "transformer.wte.weight": torch.cat([weights["transformer.wte.weight"], added])}, folder / W)
    return folder


@pytest.mark.parametrize("rows", [50258, 50304, 51200])
def test_rows_beyond_the_tokenizer_are_cut(rows: int, exported: Path, text_model: GPT2, tmp_path: Path) -> None:
    """Every command accepts the result, because its vocabulary is GPT-2's."""
    folder = resized(exported, tmp_path / "resized", rows)
    setting("eos_token_id", 50257)(folder)
    conversion = import_folder(str(folder), tmp_path / "run")
    loaded = load_model(tmp_path / "run", torch.device("cpu"))
    assert loaded.config.model.vocab_size == 50257
    assert_same(loaded.model, text_model)
    assert f"vocabulary: {rows} rows there; GPT-2's tokenizer has 50257 tokens, so the last {rows - 50257} rows" in str(
        conversion
    )
    there, here = map(float, re.findall(r"loss of ([\d.]+) with them and ([\d.]+) without", str(conversion))[0])
    assert 5 < here < there < 20
    assert "end of text: eos_token_id 50257 there, always 50256 here" in str(conversion)


def test_rows_of_another_tokenizer_are_kept(exported: Path, tmp_path: Path) -> None:
    folder = resized(exported, tmp_path / "other", 50265)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["hello"], vocabulary["world"] = vocabulary["world"], vocabulary["hello"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    model = read_folder(folder)
    assert model.config.vocab_size == 50265
    assert model.tokenizer and not model.tokenizer.is_gpt2
    [note] = [note for note in model.notes if "vocab.json is not GPT-2's (2 of 50257 tokens have another id" in note]
    assert "copy the files of that tokenizer into the new folder" in note
    (folder / "vocab.json").unlink()
    assert read_folder(folder).config.vocab_size == 50257, "tokenizer.json is GPT-2's"
    (folder / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(CheckpointError, match=r"tokenizer.json: 'model' must be an object with 'vocab'"):
        read_folder(folder)


def test_dtypes_and_attention_are_noted(run_folder: Path, exported: Path, tmp_path: Path) -> None:
    assert read_folder(exported).notes == [], "a folder that is imported without any difference"
    folder = export_checkpoint(run_folder, tmp_path / "out", "bfloat16").path
    setting("reorder_and_upcast_attn", True)(folder)
    assert read_folder(folder).notes == [
        "attention: scores in fp32 there (reorder_and_upcast_attn), in the dtype of run.precision here",
        "weights: bfloat16 there, stored as fp32 without a change in value",
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small folder to copy and damage."""
    folder = tmp_path_factory.mktemp("small")
    transformers = pytest.importorskip("transformers")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).save_pretrained(folder)
    return folder


def setting(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, key: value}))

    return change


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors")

    return apply


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (setting("model_type", "llama"), 'config.json: \'model_type\' is "llama"; GPT-2 has "gpt2"'),
    (setting("activation_function", "relu"), '\'activation_function\' is "relu"; GPT-2 has "gelu_new"'),
    (setting("scale_attn_by_inverse_layer_idx", True), "'scale_attn_by_inverse_layer_idx' is true"),
    (setting("scale_attn_weights", False), "'scale_attn_weights' is false"),
    (setting("tie_word_embeddings", False), "'tie_word_embeddings' is false"),
    (setting("add_cross_attention", True), "'add_cross_attention' is true"),
    (setting("layer_norm_epsilon", 1e-6), "'layer_norm_epsilon' is 1e-06; GPT-2 has 1e-05"),
    (setting("n_inner", 99), "'n_inner' is 99; GPT-2 has 32, 4 n_embd"),
    (setting("n_layer", None), "'n_layer' must be a whole number from 1, it is null"),
    (setting("n_head", 3), r"n_embd \(8\) must be a multiple of n_head \(3\)"),
    (setting("n_layer", 2), "config.json: 'n_layer' is 2, and the weights have 1 blocks"),
    (setting("n_layer", 10**9), "config.json: 'n_layer' is 1000000000, and the weights have 1 blocks"),
    (
        tensors(lambda t: t.pop("transformer.h.0.ln_1.weight")),
        "'transformer.h.0.ln_1.weight' is missing; 'config.json'",
    ),
    (setting("n_embd", 16), r"'vocab_size' 89 and 'n_embd' 16 contradict 'transformer.wte.weight', .* \[89, 8\]"),
    (setting("vocab_size", 90), r"'vocab_size' 90 and 'n_embd' 8 contradict 'transformer.wte.weight', .* \[89, 8\]"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read .Expecting property name"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    (
        lambda folder: (folder / "config.json").unlink(),
        "config.json: missing; expected a folder of a Hugging Face model",
    ),
    (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor pytorch_model.bin"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"12"), "model.safetensors: cannot be read"),
    (tensors(lambda t: t.update({"lm_head.weight": torch.ones(89, 8)})), "'lm_head.weight' differs from"),
    (
        tensors(lambda t: t.update({"score.weight": torch.ones(2, 8)})),
        "'transformer.score.weight' does not exist in the GPT-2",
    ),
    (tensors(lambda t: t.update({"wpe.weight": torch.ones(16, 8)})), "is stored twice, with and without a prefix"),
    (
        tensors(lambda t: t.update({"transformer.wpe.weight": torch.ones(16, 8, dtype=torch.int8)})),
        "'transformer.wpe.weight' is torch.int8",
    ),
    (
        tensors(lambda t: t["transformer.ln_f.weight"].fill_(math.nan)),
        "'transformer.ln_f.weight': 8 of 8 numbers are NaN or infinite",
    ),
    (
        tensors(lambda t: t.update({"transformer.ln_f.bias": torch.full((8,), 1e300, dtype=torch.float64)})),
        "'transformer.ln_f.bias': 8 of 8 numbers are NaN or infinite",
    ),
    (
        tensors(lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)})),
        "'transformer.h.0.attn.bias': is not the mask of causal attention",
    ),
    (
        tensors(lambda t: t.update({"lm_head.weight": torch.ones(89, 8, dtype=torch.float16)})),
        "'lm_head.weight' differs from",
    ),
    (
        lambda folder: save_file({"encoder.wte": torch.ones(2)}, folder / W),
        "holds no 'transformer.wte.weight', the embedding of a GPT-2; its keys are 'encoder.wte'",
    ),
    (
        tensors(lambda t: t.update({"transformer.ln_g.bias": t.pop("transformer.ln_f.bias")})),
        "'transformer.ln_f.bias' is missing; .*among names that GPT-2 lacks, its keys are 'ln_g.bias'",
    ),
    (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "other.safetensors")
            and (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
        ),
        "names '../b', which is not a file beside it",
    ),
    (
        lambda folder: (
            (folder / "model.safetensors").unlink()
            or torch.save({"wte.weight": Path("x")}, folder / "pytorch_model.bin")
        ),
        "pytorch_model.bin: holds pathlib.* only tensors and plain values are loaded",
    ),
]


def test_another_name_of_the_same_activation_function_is_accepted(small: Path, tmp_path: Path) -> None:
    setting("activation_function", "gelu_pytorch_tanh")(shutil.copytree(small, tmp_path / "small"))
    assert_same(imported(tmp_path / "small", tmp_path / "run").model, imported(small, tmp_path / "other").model)


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_anything_but_gpt2_is_one_line(
    damage: Callable[[Path], Any], message: str, small: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small, tmp_path / "small")
    damage(folder)
    with pytest.raises(Exception, match=message) as caught:
        import_folder(str(folder), tmp_path / "run")
    assert hasattr(caught.value, "exit_status")  # a user's mistake, not a defect
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(exported: Path, run_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="already has checkpoints"):
        import_folder(str(exported), run_folder)


def test_a_full_disk_leaves_no_folder(small: Path, tmp_path: Path) -> None:
    with largest_file(2000), pytest.raises(CheckpointError, match="File too large"):
        import_folder(str(small), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_name_is_downloaded_from_the_hub(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns[2]))
        return str(small)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    import_folder("openai-community/gpt2", tmp_path / "run")
    assert asked == [("openai-community/gpt2", "model*.safetensors")]


def test_without_a_network_a_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="no such folder here, and the hub .*ConnectionError: no route to host"):
        find_folder("openai-community/gpt2")
    with pytest.raises(CheckpointError, match="--from-hf ./nowhere: no such folder"):
        find_folder("./nowhere")

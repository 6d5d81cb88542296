"""A GGUF file has the weights and the tokenizer of the checkpoint, and llama.cpp's GPT-2 gives the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from data_tools.errors import DataError
from data_tools.shards.manifest import other_tokenizer
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.config.schema import SampleConfig
from pipeline.errors import CheckpointError
from pipeline.generation.text_generator import load_text_generator
from pipeline.interop import gguf_file
from pipeline.interop.gguf_file import export_gguf
from pipeline.model.gpt2 import GPT2
from tests.pipeline.conftest import largest_file, random_tokens
from tests.pipeline.interop.hugging_face.conftest import random_text_model, save_in_pieces, text_config

#: Our parameter -> llama.cpp's tensor, from its documentation of GGUF and its GPT-2.
NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
NAMES |= {f"h.{n}.{ours}": f"blk.{n}.{theirs}" for n in range(2) for ours, theirs in BLOCK.items()}
ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_text_model(text_config())


@pytest.fixture(scope="module")
def run_folder(model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "run"
    return save_in_pieces(model, text_config(folder), folder)


@pytest.fixture(scope="module")
def readers(run_folder: Path) -> dict[str, Any]:
    """Return the exported files by dtype, opened by llama.cpp's package. Only float32 has the whole tokenizer."""
    opened = {}
    with pytest.MonkeyPatch.context() as patch:
        for dtype in ROUNDING:
            opened[dtype] = gguf.GGUFReader(export_gguf(run_folder, run_folder.parent / f"{dtype}.gguf", dtype).path)
            patch.setattr(gguf_file, "vocabulary_and_merges", lambda: ({"a": 0, "b": 1}, [("a", "b")]))
    return opened


def read_tensors(reader: Any) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_every_tensor_is_that_of_the_checkpoint(readers: dict[str, Any], model: GPT2, dtype: str) -> None:
    tensors = read_tensors(readers[dtype])
    expected = {}
    for name, weight in model.named_parameters():
        module, _, kind = name.rpartition(".")
        expected[f"{NAMES[module]}.{kind}"] = weight.detach()[:50257].numpy()
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        is_exact = weight.ndim == 1 or name == "position_embd.weight"
        allowed = 0.0 if is_exact else ROUNDING[dtype] * np.abs(weight) + 1e-7 * (dtype == "float16")
        assert tensors[name].shape == weight.shape
        assert (np.abs(tensors[name] - weight) <= allowed).all(), name
    types = {tensor.name: tensor.tensor_type.name for tensor in readers[dtype].tensors}
    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert types["token_embd.weight"] == types["blk.1.ffn_down.weight"] == short
    assert types["position_embd.weight"] == types["blk.1.attn_norm.weight"] == types["output_norm.bias"] == "F32"


def test_the_settings_are_those_of_the_model(readers: dict[str, Any]) -> None:
    fields = {key: field.contents() for key, field in readers["float16"].fields.items() if "tokens" not in key}
    assert fields["general.architecture"] == "gpt2"
    assert fields["general.name"] == 'a "quoted" name'
    assert fields["general.file_type"] == 1
    sizes = {"block_count": 2, "context_length": 256, "embedding_length": 24, "feed_forward_length": 96}
    assert {key: fields[f"gpt2.{key}"] for key in sizes} == sizes
    assert fields["gpt2.attention.head_count"] == 3
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)


def test_the_tokenizer_is_ours(readers: dict[str, Any]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    fields = readers["float32"].fields
    tokens, merges = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.merges"].contents()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    theirs = tokenizers.ByteLevelBPETokenizer({token: number for number, token in enumerate(tokens)}, pairs)
    for text in ("Hello world", " Grüße, 世界! 🎉🎉\n\n\ttabs", "don't I'LL we've 12345 ½", "x" * 300):
        assert theirs.encode(text).ids == load_tokenizer().encode(text).tolist()
    assert (fields["tokenizer.ggml.model"].contents(), fields["tokenizer.ggml.pre"].contents()) == ("gpt2", "gpt-2")
    assert tokens[END_OF_TEXT] == "<|endoftext|>"
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[END_OF_TEXT] == gguf.TokenType.CONTROL and set(types[:END_OF_TEXT]) == {gguf.TokenType.NORMAL}
    assert fields["tokenizer.ggml.eos_token_id"].contents() == END_OF_TEXT


def llama_cpp_logits(tensors: dict[str, np.ndarray], heads: int, tokens: np.ndarray) -> np.ndarray:
    """Compute the logits of one text from a file's tensors alone, in the order of llama.cpp's ``src/models/gpt2.cpp``.

    The output layer is the token embedding, because the file has no tensor ``output.weight``.
    """

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def attention(x: np.ndarray) -> np.ndarray:
        q, k, v = (part.reshape(len(x), heads, -1).swapaxes(0, 1) for part in np.split(x, 3, axis=-1))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return ((weights / weights.sum(-1, keepdims=True)) @ v).swapaxes(0, 1).reshape(len(x), -1)

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = tensors["token_embd.weight"][tokens] + tensors["position_embd.weight"][: len(tokens)]
    for block in ("blk.0", "blk.1"):
        x = x + linear(attention(linear(norm(x, f"{block}.attn_norm"), f"{block}.attn_qkv")), f"{block}.attn_output")
        x = x + linear(gelu(linear(norm(x, f"{block}.ffn_norm"), f"{block}.ffn_up")), f"{block}.ffn_down")
    return norm(x, "output_norm") @ tensors["token_embd.weight"].T


def test_the_graph_of_llama_cpp_gives_our_logits(readers: dict[str, Any], model: GPT2) -> None:
    tokens = random_tokens(1, 40, vocab_size=50257)
    with torch.no_grad():
        expected = model.logits(tokens)[0].numpy()
    for dtype, tolerance in (("float32", 1e-4), ("float16", 2e-2)):
        tensors = {name: tensor.astype(np.float64) for name, tensor in read_tensors(readers[dtype]).items()}
        found = llama_cpp_logits(tensors, 3, tokens[0].numpy())
        assert np.abs(found - expected).max() <= tolerance
        assert (found.argmax(-1) == expected.argmax(-1)).all() or dtype != "float32"


def test_a_mistake_is_one_line_and_leaves_no_file(run_folder: Path, model: GPT2, tmp_path: Path) -> None:
    (tmp_path / "used.gguf").touch()
    with pytest.raises(CheckpointError, match=r"--out: .*used.gguf already exists; name a new file"):
        export_gguf(run_folder, tmp_path / "used.gguf", "float32")
    with largest_file(100_000), pytest.raises(DataError, match=r"cannot write .*full.gguf"):
        export_gguf(run_folder, tmp_path / "full.gguf", "float32")
    other = text_config(tmp_path / "other", vocab_size=1000)
    save_in_pieces(random_text_model(other), other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="model.vocab_size is 1000; a GGUF file contains a tokenizer"):
        export_gguf(tmp_path / "other", tmp_path / "other.gguf", "float32")
    save_in_pieces(model, text_config(tmp_path / "same_size"), tmp_path / "same_size", other_tokenizer(50257))
    with pytest.raises(CheckpointError, match="the model's tokens are of the tokenizer 'other' .*; a GGUF file"):
        export_gguf(tmp_path / "same_size", tmp_path / "other.gguf", "float32")

    large = random_text_model(text_config())
    with torch.no_grad():
        large.h[1].mlp.c_fc.weight[0, 0] = 70_000
    save_in_pieces(large, text_config(tmp_path / "large"), tmp_path / "large")
    with pytest.raises(CheckpointError, match=r"h.1.mlp.c_fc.weight: 1 of .* in torch.float16; export with --dtype"):
        export_gguf(tmp_path / "large", tmp_path / "large.gguf", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "other", "same_size", "used.gguf"]


def test_a_model_that_restarts_positions_gets_a_note(tmp_path: Path) -> None:
    config = text_config(tmp_path / "run", reset_positions_at=END_OF_TEXT)
    save_in_pieces(random_text_model(config), config, tmp_path / "run")
    export = export_gguf(tmp_path / "run", tmp_path / "new" / "model.gguf", "float16")
    assert "positions: llama.cpp does not restart them at token 50256" in str(export)
    assert str(export).startswith(f"wrote {tmp_path / 'new' / 'model.gguf'}, weights ")


def test_llama_cpp_itself_generates_the_same_text(run_folder: Path, readers: dict[str, Any]) -> None:
    """Run llama.cpp where a package with its compiled code is installed: pip install xllamacpp."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(run_folder.parent / "float32.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    prompts = ["The meaning of life is", " Grüße, 世界! 🎉\n\n\ttabs don't 12345"]
    greedy = SampleConfig(temperature=0, max_new_tokens=20)
    expected = load_text_generator(run_folder, torch.device("cpu")).complete(prompts, greedy, 0)
    for prompt, text in zip(prompts, expected, strict=True):
        found = server.handle_completions({"prompt": prompt, "max_tokens": 20, "temperature": 0.0, "top_k": 1})
        assert found["usage"]["prompt_tokens"] == len(load_tokenizer().encode(prompt))
        assert found["choices"][0]["text"] == text

"""Export a checkpoint as a GGUF file for llama.cpp.

The file has the tensor names, metadata keys and dtypes that llama.cpp's ``convert_hf_to_gguf.py`` writes.
"""

from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
)
from torch import Tensor

from data_tools.errors import one_line_write_errors
from data_tools.storage.atomic import fsync_file, partial_path, publish
from data_tools.storage.files import require_writable
from data_tools.vocabulary import END_OF_TEXT, GPT2_VOCAB_SIZE
from pipeline.checkpoint.finite import describe_not_finite
from pipeline.checkpoint.layout import STATE_FILE
from pipeline.checkpoint.loading import describe_other_vocabulary, pieces_of_weights, read_parameter
from pipeline.checkpoint.state import read_state
from pipeline.checkpoint.verification import read_located
from pipeline.checkpoint.weights_copy import locate_weights_of
from pipeline.config.loading import config_from_json
from pipeline.config.schema import Config, ModelConfig
from pipeline.errors import CheckpointError
from pipeline.interop.export import Export, describe_positions
from pipeline.interop.foreign import model_shapes, require_gpt2
from pipeline.interop.hugging_face.layout import hugging_face_name
from pipeline.interop.hugging_face.tokenizer_files import vocabulary_and_merges
from pipeline.model.gpt2 import LAYER_NORM_EPS
from pipeline.model.parameter_state import POSITION_EMBEDDING, TOKEN_EMBEDDING

#: Option -> dtype of the matrices, its name in the file, and the name of the whole file's type.
_DTYPES = {
    "float32": (torch.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
_SUFFIXES = (".weight", ".bias")
_PRE_TOKENIZER = "gpt-2"  # llama.cpp's name for GPT-2's rules that divide a text into words


def export_gguf(checkpoint: Path | str, out: Path, dtype: str, weights: str = "training") -> Export:
    """Export a checkpoint as the file ``out``. Only one parameter is in memory at a time.

    If the export fails, ``out`` does not exist.

    Args:
        checkpoint: a checkpoint folder, or a run folder for its newest good checkpoint.
        dtype: ``float32``, ``float16`` or ``bfloat16``. Vectors and the position embedding are always in float32, as
            llama.cpp expects.
        weights: ``training``, or ``ema`` for the moving average of the weights.

    Raises:
        CheckpointError: there is no good checkpoint with these weights, ``out`` exists, the model is not a GPT-2, the
            vocabulary is not GPT-2's, or a weight is too large for float16.
        DataError: the file could not be written.
    """
    if out.exists():
        raise CheckpointError(f"--out: {out} already exists; name a new file, such as model.gguf")
    require_writable(out.parent, "--out")
    return read_located(
        lambda: locate_weights_of(checkpoint, weights), lambda source: _export(source, out, dtype, weights)
    )


def _export(source: Path, out: Path, dtype: str, weights: str) -> Export:
    state, stored = read_state(source)
    config = config_from_json(stored, origin=str(source / STATE_FILE))
    require_gpt2(str(source), config.model)
    if problem := describe_other_vocabulary(config.model, state.tokenizer):
        raise CheckpointError(
            f"{source}: {problem}; a GGUF file contains a tokenizer, which needs GPT-2's vocabulary, {GPT2_VOCAB_SIZE}"
        )
    aside = partial_path(out)
    with one_line_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_file(aside, source, config, dtype, weights)
            fsync_file(aside)
            publish(aside, out)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    return Export(out, out.stat().st_size, describe_positions(config.model, "llama.cpp"))


def _write_file(path: Path, source: Path, config: Config, dtype: str, weights: str) -> None:
    shapes = model_shapes(config.model)
    pieces = pieces_of_weights(source, shapes, weights)
    shapes[TOKEN_EMBEDDING] = [config.model.vocab_size, config.model.n_embd]  # without padding rows
    kinds = {name: _kind_of(name, shape, dtype) for name, shape in shapes.items()}
    names = get_tensor_name_map(MODEL_ARCH.GPT2, config.model.n_layer)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[MODEL_ARCH.GPT2])
    try:
        _add_settings(writer, config, dtype)
        _add_tokenizer(writer)
        for name, shape in shapes.items():
            torch_dtype, stored_type, _ = _DTYPES[kinds[name]]
            key = names.get_name(hugging_face_name(name), _SUFFIXES)
            writer.add_tensor_info(
                key, shape, np.dtype(np.int16), torch_dtype.itemsize * torch.Size(shape).numel(), stored_type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape in shapes.items():
            parameter = read_parameter(model_shapes(config.model)[name], pieces[name])[: shape[0]]
            writer.write_tensor_data(_to_numpy(name, parameter, _DTYPES[kinds[name]][0]))
    finally:
        writer.close()


def _kind_of(name: str, shape: list[int], dtype: str) -> str:
    return "float32" if len(shape) == 1 or name == POSITION_EMBEDDING else dtype


def _to_numpy(name: str, parameter: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return a parameter in the dtype of the file. 16-bit floats are returned as int16, because NumPy has no bf16."""
    converted = parameter.to(dtype).contiguous()
    if problem := describe_not_finite(converted):
        raise CheckpointError(f"{name}: {problem} in {dtype}; export with --dtype bfloat16 or float32")
    return (converted.view(torch.int16) if dtype.itemsize == 2 else converted).numpy()


def _add_settings(writer: GGUFWriter, config: Config, dtype: str) -> None:
    model: ModelConfig = config.model
    writer.add_type(GGUFType.MODEL)
    writer.add_name(config.run.name)
    writer.add_file_type(_DTYPES[dtype][2])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(model.n_layer)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(4 * model.n_embd)
    writer.add_head_count(model.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPS)


def _add_tokenizer(writer: GGUFWriter) -> None:
    vocabulary, merges = vocabulary_and_merges()
    types = [TokenType.CONTROL if token == END_OF_TEXT else TokenType.NORMAL for token in vocabulary.values()]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZER)
    writer.add_token_list(list(vocabulary))
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(END_OF_TEXT)
    writer.add_add_bos_token(False)

"""Compare generation with ``transformers``: tokens per second, and the greedy completions.

python -m benchmarks.generation                     # what `make bench-generation` runs; run nothing else on the machine
python -m benchmarks.generation --device cuda

Both programs continue the same prompts with the same random weights of GPT-2 124M. ``transformers`` runs in every
setting that could be its fastest one. The time includes prefill, but not compilation.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import CompileConfig

from benchmarks.transformers_model import transformers_model
from data_tools.vocabulary import GPT2_VOCAB_SIZE
from pipeline.config.schema import ModelConfig, SampleConfig
from pipeline.generation.generate import Decoder, generate_batch
from pipeline.generation.text_generator import DTYPES
from pipeline.model.gpt2 import GPT2, build_model
from pipeline.model.packed_linear import WAYS, inference_linear, linear_layers, pack_linear_layers

PROMPT_TOKENS = 32
PRODUCT_ROWS = (1, 2, 4, 512)  # one row per completion in generation, and the rows of a prompt
ROUNDS = 3
PRODUCT_ROUNDS = 20
#: Name -> implementation of attention, and whether to use the static cache under torch.compile.
TRANSFORMERS_SETTINGS = {
    "transformers, sdpa": ("sdpa", False),
    "transformers, eager": ("eager", False),
    "transformers, static, compiled": ("sdpa", True),
}

Texts = list[list[int]]  # token ids
Product = Callable[[nn.Linear], Tensor]
Contender = Callable[[Texts, int], Texts]  # prompts and a number of tokens -> the new tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default: %(default)s)")
    parser.add_argument("--preset", default="gpt2", help="the model (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--batch",
        nargs="*",
        type=int,
        default=[1, 4],
        help="prompts per batch; without a number only the matrix products (default: 1 4)",
    )
    parser.add_argument(
        "--rows", nargs="+", type=int, default=PRODUCT_ROWS, help="rows of the products on a CPU (default: 1 2 4 512)"
    )
    parser.add_argument("--tokens", type=int, default=100, help="new tokens per prompt (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the tokens per second to this JSON file")
    arguments = parser.parse_args()
    model = build_model(ModelConfig.model_validate({"preset": arguments.preset}), 1).eval().to(arguments.device)
    on_cpu = arguments.device == "cpu"
    where = f"{torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, {arguments.preset}, {arguments.tokens} tokens")
    found: dict[str, dict[str, float]] = {}
    for precision in arguments.precision:
        if on_cpu:
            print_limit(model, DTYPES[precision])
            print_products(model, precision, arguments.rows)
        contenders: dict[str, Contender] = {}
        for name, (attention, compiled) in TRANSFORMERS_SETTINGS.items():
            contenders[name] = their_contender(model, DTYPES[precision], attention, compiled)
        for batch in arguments.batch:
            setting = f"{precision}, batch {batch}"
            print(f"\n{setting}")
            own = {"ours": own_contender(model, DTYPES[precision], batch)}
            found[setting] = print_speeds({**own, **contenders}, batch, arguments.tokens)
    if arguments.out:
        arguments.out.write_text(json.dumps(found), encoding="utf-8")


@torch.inference_mode()
def print_limit(model: GPT2, dtype: torch.dtype) -> None:
    """Print how many steps per second are possible if a step only reads each weight of the linear layers once."""
    layers = linear_layers(model)  # in fp32; a sum over bf16 weights would be limited by arithmetic
    read_s = 1e-3 * _shortest_ms(layers, lambda layer: layer.weight.sum())
    bytes_per_s = sum(layer.weight.nbytes for layer in layers) / read_s
    step_bytes = sum(layer.weight.numel() for layer in layers) * dtype.itemsize
    print(
        f"limit: {step_bytes / 1e6:.0f} MB of weights at {bytes_per_s / 1e9:.1f} GB/s: "
        f"{1e3 * step_bytes / bytes_per_s:.1f} ms per step, {bytes_per_s / step_bytes:.1f} tokens/s per prompt"
    )


def print_products(model: GPT2, precision: str, numbers_of_rows: Sequence[int]) -> None:
    """Print the milliseconds of the linear layers of all blocks, without attention and the output layer."""
    dtype = DTYPES[precision]
    layers = linear_layers(copy.deepcopy(model.h).to(dtype))
    for rows in numbers_of_rows:
        inputs = {layer: torch.randn(rows, layer.in_features).to(dtype) for layer in layers}
        for way in WAYS[torch.float32]:
            own = {layer: inference_linear(layer, dtype, way) for layer in layers}
            ms = _shortest_ms(layers, partial(_product, own, inputs))
            name = way.layout if way.few_rows == "none" else f"{way.layout}, {way.few_rows}"
            print(f"products of the blocks, {precision}, rows: {rows:>3}, {name:<17}{ms:>8.1f} ms")


def _product(own: Mapping[nn.Linear, nn.Module], inputs: Mapping[nn.Linear, Tensor], layer: nn.Linear) -> Tensor:
    y: Tensor = own[layer](inputs[layer])
    return y


@torch.inference_mode()
def _shortest_ms(layers: Sequence[nn.Linear], product: Product) -> float:
    """Time the product of each layer several times. Return the sum of the layers' shortest times, in ms."""
    shortest = [math.inf] * len(layers)
    for _ in range(PRODUCT_ROUNDS):
        for i, layer in enumerate(layers):
            start = time.perf_counter()
            product(layer)
            shortest[i] = min(shortest[i], time.perf_counter() - start)
    return 1e3 * sum(shortest)


def own_contender(model: GPT2, dtype: torch.dtype, batch: int) -> Contender:
    """Return a contender that does what ``launch/generate.py`` does."""
    own = copy.deepcopy(model).to(dtype)
    pack_linear_layers(own, dtype, rows=batch)
    decoder = Decoder(own)

    def run(prompts: Texts, count: int) -> Texts:
        texts: Texts = [[] for _ in prompts]
        for tokens in generate_batch(decoder, prompts, SampleConfig(temperature=0, max_new_tokens=count)):
            for row, token in tokens.items():
                texts[row].append(token)
        return texts

    return run


def their_contender(model: GPT2, dtype: torch.dtype, attention: str, compiled: bool) -> Contender:
    """Return a contender that runs ``transformers``' own ``generate`` with our weights."""
    device = model.wte.weight.device
    theirs = transformers_model(model, attn_implementation=attention).to(device, dtype).eval()
    theirs.generation_config.eos_token_id = None  # no end of text, so that both programs generate all tokens
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    if compiled:
        options["cache_implementation"] = "static"
        mode = "default" if device.type == "cpu" else "reduce-overhead"  # reduce-overhead uses CUDA graphs
        options["compile_config"] = CompileConfig(mode=mode, fullgraph=False, dynamic=False)
        options["compile_config"]._compile_all_devices = True  # by default, transformers compiles only on GPUs

    def run(prompts: Texts, count: int) -> Texts:
        tokens = torch.tensor(prompts, device=device)
        written = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, **options)
        return written[:, tokens.shape[1] :].tolist()

    return run


def print_speeds(contenders: dict[str, Contender], batch: int, count: int) -> dict[str, float]:
    """Print one line per contender: its median speed, and this speed divided by the best speed of ``transformers``.

    After one round to warm up, each round runs all contenders, so that a slow moment affects all of them.

    Returns the speeds in tokens/s.
    """
    generator = torch.Generator().manual_seed(0)
    prompts: Texts = torch.randint(GPT2_VOCAB_SIZE, (batch, PROMPT_TOKENS), generator=generator).tolist()
    texts = {name: run(prompts, count) for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(prompts, count)
            seconds[name].append(time.perf_counter() - start)
    speeds = {name: batch * count / statistics.median(times) for name, times in seconds.items()}  # tokens/s
    peer = max(TRANSFORMERS_SETTINGS, key=speeds.__getitem__)
    print(f"{'':<34}{'tokens/s':>10}{'factor':>8}  text")
    for name, speed in speeds.items():
        same = "as transformers" if texts[name] == texts[peer] else "different"
        print(f"{name:<34}{speed:>10.1f}{speed / speeds[peer]:>8.2f}  {same}", flush=True)
    return speeds


if __name__ == "__main__":
    main()

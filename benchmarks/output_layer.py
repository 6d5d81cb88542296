"""Compare ways to compute the loss: from all logits at once, and in blocks of the vocabulary.

python -m benchmarks.output_layer                      # 2,048 tokens, width 384, bf16 autocast, compiled
python -m benchmarks.output_layer --width 768 --threads 1

A measurement is the forward and backward pass of the output layer. The ways take turns, and every second turn has the
reverse order. Other programs on the machine affect CPU time less than elapsed time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from data_tools.vocabulary import GPT2_VOCAB_SIZE
from pipeline.distributed.cpu import keep_freed_memory
from pipeline.model.output_layer import OutputLayer
from tests.support.tables import print_header, print_row

#: The name of a way -> the value of ``run.loss_in_blocks``.
WAYS: dict[str, Literal["kept", True, False]] = {
    "from all logits": False,
    "in blocks, logits computed twice": True,
    "in blocks, logits kept": "kept",
}


def passes(layer: OutputLayer, tokens: int, *, is_compiled: bool) -> Callable[[], None]:
    """Return a function that runs the forward and backward pass in bf16 autocast."""
    hidden = torch.randn(1, tokens, layer.in_features, requires_grad=True)
    targets = torch.randint(layer.vocab_size, (1, tokens))
    compute = torch.compile(layer, dynamic=False) if is_compiled else layer

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute(hidden, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        layer.weight.grad = hidden.grad = None

    return run


def measure(
    tokens: int, width: int, vocab_size: int, *, rounds: int, is_compiled: bool
) -> dict[str, tuple[list[float], list[float]]]:
    """Return the elapsed seconds and the CPU seconds of each repetition, by way."""
    variants = {}
    for name, loss_in_blocks in WAYS.items():
        layer = OutputLayer(width, vocab_size)
        torch.nn.init.normal_(layer.weight, std=0.02)
        layer.loss_in_blocks = loss_in_blocks
        variants[name] = passes(layer, tokens, is_compiled=is_compiled)
        for _ in range(2):  # the first one compiles
            variants[name]()
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in WAYS}
    for name in (*WAYS, *reversed(WAYS)) * rounds:
        before = time.perf_counter(), time.process_time()
        variants[name]()
        for times, clock, start in zip(seconds[name], (time.perf_counter, time.process_time), before, strict=True):
            times.append(clock() - start)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab-size", type=int, default=GPT2_VOCAB_SIZE)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="each round measures each way twice")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    sizes = arguments.tokens, arguments.width, arguments.vocab_size
    seconds = measure(*sizes, rounds=arguments.rounds, is_compiled=not arguments.eager)
    print(f"{' x '.join(map(str, sizes))}, bf16 autocast, {arguments.threads} threads, torch {torch.__version__}")
    print_header("loss", "elapsed, median", "CPU time, median", "CPU time, least")
    for name, (elapsed, cpu) in seconds.items():
        values = statistics.median(elapsed), statistics.median(cpu), min(cpu)
        print_row(name, *(f"{value * 1e3:.0f} ms" for value in values))


if __name__ == "__main__":
    main()

"""Score, validate and generate with one checkpoint on the CPU and on the device, and compare the results.

``python -m benchmarks.gpu_check.inference DEVICE RUN_FOLDER DATA OUT``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.bounds import loss_bound
from data_tools.shards.manifest import VAL_SPLIT
from data_tools.shards.reader import open_split
from pipeline.checkpoint.loading import load_model
from pipeline.config.schema import SampleConfig
from pipeline.distributed.world import World
from pipeline.evaluation.packing import Request
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.validation import score_split
from pipeline.generation.generate import Decoder, generate_batch
from pipeline.model.precision import replicated_compute

PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6), (5,))
NEW_TOKENS = 60  # goes beyond the context of the checkpoint, so the window moves
BATCH_TOKENS = 512


def results_on(device: torch.device, run_folder: Path, data: Path) -> dict[str, Any]:
    """Return scores, validation loss, the probabilities along greedy completions, and the completions."""
    loaded = load_model(run_folder, device)
    world = World(0, 1, 0, device)
    config = loaded.config.model
    compute = replicated_compute(loaded.model, "fp32", device).eval()
    rows = [[token % config.vocab_size for token in prompt] for prompt in PROMPTS]
    completions: list[list[int]] = [[] for _ in rows]
    for tokens in generate_batch(Decoder(loaded.model), rows, SampleConfig(temperature=0, max_new_tokens=NEW_TOKENS)):
        for row, token in tokens.items():
            completions[row].append(token)
    groups = [[Request(tuple(row), tuple(row[:length])) for length in range(1, len(row) + 1)] for row in rows]
    scores = Scorer(compute, config, world, BATCH_TOKENS).score(groups, "scores")
    with torch.inference_mode():
        validation = score_split(compute, open_split(data, VAL_SPLIT), config.context_length, 4, world)
    return {
        "scores": [score.log_likelihood for group in scores for score in group],
        "validation_loss": validation["loss"],
        "completions": completions,
    }


def compare(device: torch.device, run_folder: Path, data: Path) -> dict[str, Any]:
    expected, found = (results_on(each, run_folder, data) for each in (torch.device("cpu"), device))
    pairs = zip(expected["completions"], found["completions"], strict=True)
    figures: dict[str, Any] = {
        "largest_score_difference": max(abs(a - b) for a, b in zip(expected["scores"], found["scores"], strict=True)),
        "validation_loss_difference": abs(expected["validation_loss"] - found["validation_loss"]),
        "equal_completions": sum(a == b for a, b in pairs),
        "completions": len(PROMPTS),
    }
    bound = loss_bound("fp32")
    worst = max(figures["largest_score_difference"], figures["validation_loss_difference"])
    if not worst <= bound:
        figures["problem"] = f"scores or validation losses differ by more than {bound:g} nats"
    elif figures["equal_completions"] < len(PROMPTS):
        figures["problem"] = "greedy completions differ from those of the CPU"
    return figures


def main() -> None:
    device, run_folder, data, out = sys.argv[1:]
    figures = compare(torch.device(device), Path(run_folder), Path(data))
    Path(out).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Compare our scores with those of lm-evaluation-harness, and our speed with that of build-nanogpt's HellaSwag loop.

python -m benchmarks.evaluation --piqa FILE --lambada FILE     # what `make bench-evaluation` runs

The files are JSON lines in the form for ``launch/evaluate.py --data``. The comparison of scores needs the extra
``harness``.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F

from data_tools.tokenizer import load_tokenizer
from pipeline.checkpoint.loading import load_model
from pipeline.config.schema import ModelConfig, Precision
from pipeline.distributed.cpu import keep_freed_memory
from pipeline.distributed.world import World
from pipeline.evaluation.examples import Example, Settings, piqa
from pipeline.evaluation.protocols import ChoiceTask, PreparedTask, encode_apart
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import NAMED_TASKS, prepare_task
from pipeline.hardware.device import matmul_dtype
from pipeline.model.gpt2 import GPT2, build_model
from pipeline.model.packed_linear import pack_linear_layers
from pipeline.model.precision import replicated_compute
from tests.support.runs import make_corpus, merged, train_run
from tests.support.tables import print_header, print_row

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
BATCH_TOKENS = 2048
CONTEXT_WORDS, ENDING_WORDS = 55, 22  # about the lengths in HellaSwag

Answers = list[tuple[int, int]]  # two choices per example: the one by summed loss and the one by mean loss

#: The models by name. The second model has 30 million parameters.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2-tiny": {"preset": "gpt2-tiny"},
    "30M": {"preset": "gpt2-tiny", "n_layer": 6, "n_head": 6, "n_embd": 384},
    "gpt2": {"preset": "gpt2"},
}

#: A run of a few steps on real text, so that the weights are no longer the initial ones.
BRIEF_RUN: dict[str, dict[str, Any]] = {
    "run": {"precision": "fp32", "device": "cpu"},
    "model": {"preset": "gpt2-tiny"},
    "batch": {"tokens_per_step": 1024, "micro_batch_size": 4},
    "schedule": {"warmup_steps": 5, "max_steps": 60},
    "evaluation": {"every_steps": 1000, "max_batches": 4},
    "logging": {"sinks": ["jsonl", "console"]},
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def hub_row(row: dict[str, Any]) -> dict[str, Any]:
    """Convert an example of PIQA or LAMBADA to the form that the Hugging Face Hub uses.

    Args:
        row: has ``query``, ``choices`` and ``gold`` (PIQA), or ``context`` and ``continuation`` (LAMBADA).
    """
    if "continuation" in row:
        return {"text": f"{row['context']} {row['continuation']}"}
    if "query" in row:
        goal, (first, second) = row["query"].removeprefix("Question: ").removesuffix("\n"), row["choices"]
        return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}
    return row


def as_evaluated(model: GPT2, precision: str = "fp32") -> GPT2:
    """Return a copy with packed weights, as ``launch/evaluate.py`` uses on a CPU."""
    packed = copy.deepcopy(model)
    pack_linear_layers(packed, matmul_dtype(precision))
    return packed


def scorer_of(model: GPT2, precision: str = "fp32") -> Scorer:
    return Scorer(replicated_compute(model, precision, ALONE.device).eval(), model.config, ALONE, BATCH_TOKENS)


def print_agreement(files: dict[str, Path], limit: int, scratch: Path) -> None:
    """Score the same rows with the same weights in both programs, and print the agreement."""
    from benchmarks.lm_evaluation_harness import evaluate_with_harness

    print(f"\nAgreement with lm-evaluation-harness, the first {limit} examples, gpt2-tiny in fp32\n")
    columns = ("task", "requests", "largest difference in log-likelihood", "same choices", "acc", "harness")
    print_header("weights", *columns)
    for weights, model in (("random", random_model("gpt2-tiny")), ("60 steps", trained_model(scratch))):
        for task, path in files.items():
            rows = [hub_row(row) for row in read_lines(path)[:limit]]
            ours = prepare_task(task, str(path), Settings(limit=limit), model.config, ALONE)
            assert isinstance(ours, PreparedTask)
            scorer = scorer_of(as_evaluated(model))
            scores = scorer.score(ours.groups, task)
            split = NAMED_TASKS[task].hub.split  # type: ignore[index]
            theirs = evaluate_with_harness(model, task, {split: rows, "train": rows})
            pairs = [
                (one, other)
                for group, others in zip(scores, theirs.scores, strict=True)
                for one, other in zip(group, others, strict=True)
            ]
            largest = max(abs(one.log_likelihood - other[0]) for one, other in pairs)
            same = sum(
                chosen([(one.log_likelihood, one.is_greedy) for one in group]) == chosen(others)
                for group, others in zip(scores, theirs.scores, strict=True)
            )
            accuracies = (ours.measure(scorer)[0]["acc"], theirs.figures["acc"])
            print_row(weights, task, len(pairs), f"{largest:.1e}", f"{same} of {len(scores)}", *accuracies)


def chosen(answers: Sequence[tuple[float, bool]]) -> Any:
    """Return the most likely choice. With only one choice, return whether it is the greedy continuation."""
    return int(np.argmax([answer[0] for answer in answers])) if len(answers) > 1 else answers[0][1]


def random_model(name: str) -> GPT2:
    return build_model(ModelConfig.model_validate(MODELS[name]), 1337).eval()


def trained_model(scratch: Path) -> GPT2:
    corpus = make_corpus(scratch / "data")
    result = train_run("ddp", scratch / "run", merged(BRIEF_RUN, {"data": {"path": str(corpus)}}))
    assert result.returncode == 0, result.stderr
    return load_model(scratch / "run", ALONE.device).model


def like_hellaswag(texts: Sequence[str]) -> list[Example]:
    """Return examples with four choices: the ending of the passage, and three endings of other passages."""
    words = [text.split() for text in texts]
    words = [text for text in words if len(text) >= CONTEXT_WORDS + ENDING_WORDS]
    endings = [" ".join(text[CONTEXT_WORDS : CONTEXT_WORDS + ENDING_WORDS]) for text in words]
    found = []
    for at, text in enumerate(words):
        choices = tuple(endings[(at + shift) % len(endings)] for shift in range(4))
        context = " ".join(text[:CONTEXT_WORDS])
        found.append(Example(tuple((context, f" {choice}") for choice in choices), 0, choices))
    return found


@torch.no_grad()
def one_at_a_time(model: GPT2, examples: Sequence[Example], precision: str) -> Answers:
    """Score as build-nanogpt scores HellaSwag: one example per forward pass, logits at all positions, a masked loss."""
    tokenizer, compute = load_tokenizer(), replicated_compute(model, precision, ALONE.device).eval()
    answers = []
    for example in examples:
        rows = [
            (tokenizer.encode(before).tolist(), tokenizer.encode(after).tolist()) for before, after in example.pairs
        ]
        width = max(len(before) + len(after) for before, after in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width)
        for row, (before, after) in enumerate(rows):
            tokens[row, : len(before) + len(after)] = torch.tensor(before + after)
            mask[row, len(before) : len(before) + len(after)] = 1
        logits = compute(tokens, method="logits")  # (choices, T, V)
        losses = F.cross_entropy(
            logits[:, :-1].contiguous().flatten(0, 1), tokens[:, 1:].contiguous().flatten(), reduction="none"
        ).view(len(rows), -1)
        sums = (losses * mask[:, 1:]).sum(1)
        answers.append((int(sums.argmin().item()), int((sums / mask[:, 1:].sum(1)).argmin().item())))
    return answers


def together(model: GPT2, examples: Sequence[Example], precision: str, *, shared: bool = True) -> Answers:
    """Score with our scorer, including the encoding. If ``shared``, process the common prefix of choices once."""
    tokenizer = load_tokenizer()
    task = ChoiceTask("", piqa, encode_apart, "tokens")
    groups = [[encode_apart(tokenizer, *pair) for pair in example.pairs] for example in examples]
    scored = groups if shared else [[request] for group in groups for request in group]
    scores = iter([score for group in scorer_of(model, precision).score(scored, "") for score in group])
    answers = task.answers(examples, groups, [[next(scores) for _ in group] for group in groups])
    return list(zip(*answers.values(), strict=True))


def print_speed(files: dict[str, Path], models: Sequence[str], count: int, precision: str, loop_precision: str) -> None:
    """Print the examples per second of the scorer and of the loop, and how many answers are equal."""
    questions = [piqa(row) for row in read_lines(files["piqa"])[:count]]
    passages = like_hellaswag([hub_row(row)["text"] for row in read_lines(files["lambada"])])[:count]
    print(
        f"\nSpeed on this CPU with {torch.get_num_threads()} threads, the loop in {loop_precision}, the scorer in "
        f"{precision}, {count} examples, random weights\n"
    )
    columns = ("one at a time", "scorer, beginnings not shared", "scorer", "ratio", "same answers")
    print_header("model", "data", *columns)
    data_sets = {"PIQA": questions, "like HellaSwag": passages}
    built = {name: random_model(name) for name in models}
    runs = [(name, data, built[name], data_sets[data]) for name in models for data in data_sets]
    loops = []
    for *_, model, examples in runs:
        one_at_a_time(model, examples[:2], loop_precision)  # warm up
        loops.append(timed(one_at_a_time, model, examples, loop_precision))
    keep_freed_memory()  # as launch/evaluate.py does; it comes after the loop, because it cannot be undone
    for (name, data, model, examples), (slow, expected) in zip(runs, loops, strict=True):
        packed = as_evaluated(model, precision)
        together(packed, examples[:2], precision)
        apart, _ = timed(together, packed, examples, precision, shared=False)
        fast, found = timed(together, packed, examples, precision)
        same = sum(one == other for one, other in zip(expected, found, strict=True))
        speeds = [f"{len(examples) / seconds:.2f}/s" for seconds in (slow, apart, fast)]
        print_row(name, data, *speeds, f"{slow / fast:.1f}", f"{same} of {len(examples)}")


def timed(score: Callable[..., Answers], *arguments: Any, **options: Any) -> tuple[float, Answers]:
    started = time.perf_counter()
    answers = score(*arguments, **options)
    return time.perf_counter() - started, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piqa", type=Path, required=True)
    parser.add_argument("--lambada", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300, help="examples to compare with the harness; 0 for none")
    parser.add_argument("--examples", type=int, default=32, help="examples to measure the speed; 0 for none")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="models to measure the speed"
    )
    parser.add_argument("--precision", default="fp32", choices=get_args(Precision), help="precision of the scorer")
    parser.add_argument(
        "--loop-precision", choices=get_args(Precision), help="precision of the loop (default: the scorer's)"
    )
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = {"piqa": arguments.piqa, "lambada": arguments.lambada}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.limit:
            print_agreement(files, arguments.limit, Path(scratch))
    if arguments.examples:
        loop_precision = arguments.loop_precision or arguments.precision
        print_speed(files, arguments.models, arguments.examples, arguments.precision, loop_precision)


if __name__ == "__main__":
    main()

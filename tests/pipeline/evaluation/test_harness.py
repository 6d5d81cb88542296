"""Scores and figures equal those of lm-evaluation-harness, where it is installed (the extra ``harness``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.examples import Settings
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import prepare_task
from pipeline.model.gpt2 import GPT2
from tests.pipeline.evaluation.conftest import ALONE, ARC, HELLASWAG, LAMBADA, PIQA, WINOGRANDE

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[harness]'")

PAGES = [
    {"page": " = One = \n\n It cost 1 @,@ 000 ; \" five 's \" or [ N ] . \n = = Part = = \n 5 ° C , ' yes ' : \n" * 4},
    {"page": " = Two = \n\n No ( none ) . \n"},
]
DOORS = [
    {
        "sentence": f"The {thing} was behind the door, so the _ opened.",
        "option1": thing,
        "option2": "door",
        "answer": "2",
    }
    for thing in ("cat", "dog", "tree", "house")
]
SPLITS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "piqa": {"validation": PIQA, "train": PIQA[2:]},
    "lambada": {"test": LAMBADA},
    "hellaswag": {"validation": [HELLASWAG] * 2, "train": [HELLASWAG]},
    "arc_easy": {
        "test": [ARC],
        "validation": [ARC],
        "train": [ARC, {**ARC, "question": "What is dry?", "answerKey": "C"}],
    },
    "winogrande": {"validation": [WINOGRANDE, {**WINOGRANDE, "answer": "2"}], "train": DOORS},
    "wikitext2": {"test": PAGES, "validation": PAGES, "train": PAGES},
}


@pytest.mark.parametrize(
    ("task", "shots"), [*((task, 0) for task in SPLITS), ("piqa", 2), ("arc_easy", 1), ("winogrande", 2)]
)
def test_scores_and_figures(
    task: str, shots: int, text_model: GPT2, scorer: Scorer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks.lm_evaluation_harness import evaluate_with_harness, replaced_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with replaced_hub(SPLITS[task]):
        prepared = prepare_task(task, None, Settings(shots=shots), scorer.model, ALONE)
    theirs = evaluate_with_harness(text_model, task, SPLITS[task], shots=shots)
    ours, _ = prepared.measure(scorer)
    for key in ("acc", "acc_norm", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"):
        if key in ours or key in theirs.figures:
            assert ours[key] == pytest.approx(theirs.figures[key], rel=1e-5), key
    if task != "wikitext2":
        for group, others in zip(scorer.score(prepared.groups, ""), theirs.scores, strict=True):
            for score, (log_likelihood, is_greedy) in zip(group, others, strict=True):
                assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-3)
                assert score.is_greedy == is_greedy

"""From the rows of a data set to examples: what is shown to the model, and what counts as right.

Prompts, separators and choices are those of lm-evaluation-harness, by its YAML files and ``utils.py`` of each task.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.evaluation.sources import Row

SHOT_SEPARATOR = "\n\n"  # after each few-shot example: lm-evaluation-harness' fewshot_delimiter


@dataclass(frozen=True)
class ChoiceExample:
    """Pairs of context and continuation, one of which is right."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    choices: tuple[str, ...]  # whose lengths acc_norm divides by

    def __post_init__(self) -> None:
        if not 0 <= self.gold < len(self.pairs):
            raise ValueError(f"the right choice is {self.gold}, there are {len(self.pairs)}")

    @property
    def shot(self) -> str:
        """The solved example, as it stands before another."""
        return "".join(self.pairs[self.gold]) + SHOT_SEPARATOR


@dataclass(frozen=True)
class ContinuationExample:
    """A context and its only right continuation."""

    context: str
    continuation: str
    shot: str


def _choose(context: str, choices: list[str], gold: int) -> ChoiceExample:
    """One context; a space stands before each choice, whatever it begins with, as lm-evaluation-harness has it."""
    return ChoiceExample(tuple((context, " " + choice) for choice in choices), gold, tuple(choices))


def any_choices(row: Row) -> ChoiceExample:
    """``query``, ``choices``, ``gold``: the text, the list of its continuations, the index of the right one."""
    return _choose(row["query"], row["choices"], int(row["gold"]))


def any_continuation(row: Row) -> ContinuationExample:
    """``context`` and ``continuation``, with a space between them where neither has white space at the seam."""
    context, continuation = row["context"], row["continuation"]
    if context and not context[-1].isspace() and not continuation[:1].isspace():
        continuation = " " + continuation
    return ContinuationExample(context, continuation, context + continuation + SHOT_SEPARATOR)


def piqa(row: Row) -> ChoiceExample:
    """``goal``, ``sol1``, ``sol2``, ``label``; or ``query``, ``choices``, ``gold``, the query with or without its end.

    Evaluation suites pass PIQA on with queries of the form "Question: ...\\n", to which the "Answer:" belongs.
    """
    if "query" in row:
        question = row["query"].removesuffix("Answer:").removesuffix("\n")
        return _choose(f"{question}\nAnswer:", row["choices"], int(row["gold"]))
    return _choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def arc(row: Row) -> ChoiceExample:
    """``question``, ``choices`` (``text`` and ``label``), ``answerKey``; or ``query``, ``choices``, ``gold``."""
    if "query" in row:
        return any_choices(row)
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return _choose(f"Question: {row['question']}\nAnswer:", list(texts), list(labels).index(row["answerKey"]))


def hellaswag(row: Row) -> ChoiceExample:
    """``activity_label``, ``ctx_a``, ``ctx_b``, ``endings``, ``label``; or ``query``, ``choices``, ``gold``."""
    if "query" in row:
        return any_choices(row)
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _choose(_without_markup(context), [_without_markup(ending) for ending in row["endings"]], int(row["label"]))


def _without_markup(text: str) -> str:
    """Half of HellaSwag is from WikiHow, whose headings left brackets behind."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_completion(row: Row) -> ChoiceExample:
    """``ctx``, ``endings``, ``label`` as they stand; or ``query``, ``choices``, ``gold``."""
    if "query" in row:
        return any_choices(row)
    return _choose(row["ctx"], row["endings"], int(row["label"]))


def winogrande(row: Row) -> ChoiceExample:
    """``sentence`` with a blank ``_``, ``option1``, ``option2``, ``answer``: either option before the same rest.

    Partial scoring (Trinh and Le 2018): only what follows the blank is scored, so the option's own length and
    frequency play no part.
    """
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no blank _")
    options = (row["option1"], row["option2"])
    rest = " " + after.strip()
    return ChoiceExample(tuple((before + option, rest) for option in options), int(row["answer"]) - 1, options)


def lambada(row: Row) -> ContinuationExample:
    """``text``, whose last word is to be guessed; or ``context`` and ``continuation``, that word.

    As a few-shot example lm-evaluation-harness puts two spaces before the word, and so does this.
    """
    if "context" in row:
        context, word = row["context"], row["continuation"].removeprefix(" ")
    else:
        context, word = row["text"].rsplit(" ", 1)
    return ContinuationExample(context, f" {word}", f"{context}  {word}{SHOT_SEPARATOR}")

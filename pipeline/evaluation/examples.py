"""Turn the rows of a dataset into examples and few-shot prompts, as lm-evaluation-harness does.

A function that converts a row to an example is called a *reader*. The first line of its docstring names the expected
columns. Error messages quote this line.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from data_tools.errors import DataError, list_names
from data_tools.tokenizer import Tokenizer
from pipeline.evaluation.sources import Row, Rows, as_json, index_field, text_field, texts_field

SHOT_SEPARATOR = "\n\n"  # the text after each few-shot example: the fewshot_delimiter of lm-evaluation-harness
SHOTS_SEED = 1234  # the default fewshot_random_seed of lm-evaluation-harness


@dataclass(frozen=True)
class Example:
    """Pairs of a context and a continuation, and the index ``gold`` of the right pair.

    An example without choices has one pair.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int = 0
    choices: tuple[str, ...] = ()  # acc_norm divides each log-likelihood by the choice's length
    solved: str | None = None  # the example in few-shot prompts; if None, the right context and continuation
    rendered_by_file: bool = False  # the file contains the prompt, which may differ from the task's usual prompt

    @property
    def shot(self) -> str:
        """Return the text of this example in a few-shot prompt: context, right answer and ``SHOT_SEPARATOR``."""
        return (self.solved or "".join(self.pairs[self.gold])) + SHOT_SEPARATOR

    def require_answers(self) -> None:
        """Raise ValueError if a choice or a continuation is empty or contains only white space."""
        for number, choice in enumerate(self.choices, 1):
            if not choice.strip():
                raise ValueError(f"choice {number} is empty")
        if any(not continuation.strip() for _, continuation in self.pairs):
            raise ValueError("the text to score is empty")


def _choose(context: str, choices: list[str], gold: int) -> Example:
    """Return an example with a space before each choice, as in lm-evaluation-harness."""
    return Example(tuple((context, " " + choice) for choice in choices), gold, tuple(choices))


def any_choices(row: Row) -> Example:
    """Read ``query``, ``choices``, ``gold``: the context, its continuations, and the index of the right continuation.

    Each continuation gets a space at its beginning.
    """
    choices = texts_field(row, "choices")
    return _choose(text_field(row, "query"), choices, index_field(row, "gold", len(choices)))


def any_continuation(row: Row) -> Example:
    """Read ``context`` and ``continuation``.

    If no white space separates them, the continuation gets a space at its beginning.
    """
    return Example((_joined(text_field(row, "context"), text_field(row, "continuation")),))


def any_contexts(row: Row) -> Example:
    """Read ``contexts`` (a list), ``continuation``, and ``gold`` (the index of the right context).

    If no white space separates a context from the continuation, a space is inserted.
    """
    contexts, continuation = texts_field(row, "contexts"), text_field(row, "continuation")
    pairs = tuple(_joined(context, continuation) for context in contexts)
    return Example(pairs, index_field(row, "gold", len(contexts)), tuple(contexts))


def _joined(context: str, continuation: str) -> tuple[str, str]:
    needs_space = context and not context[-1].isspace() and not continuation[:1].isspace()
    return context, f" {continuation}" if needs_space else continuation


def piqa(row: Row) -> Example:
    """Read ``goal``, ``sol1``, ``sol2``, ``label``; or ``query``, ``choices``, ``gold``.

    The context is the question, followed by "Answer:".
    """
    if "query" in row:
        return _question(row, range(2, 3))
    choices = [text_field(row, "sol1"), text_field(row, "sol2")]
    return _choose(f"Question: {text_field(row, 'goal')}\nAnswer:", choices, index_field(row, "label", 2))


def arc(row: Row) -> Example:
    """Read ``question``, ``choices`` and ``answerKey``, or else ``query``, ``choices`` and ``gold``.

    In the first form, ``choices`` has the lists ``text`` and ``label``. The context is the question, followed by
    "Answer:".
    """
    if "query" in row:
        return _question(row, range(3, 6))
    choices, key = row["choices"], text_field(row, "answerKey")
    if not isinstance(choices, dict):
        raise ValueError(f"choices is {as_json(choices)}; it must be an object with text and label")
    texts, labels = texts_field(choices, "text"), texts_field(choices, "label")
    if key not in labels or len(labels) != len(texts):
        raise ValueError(f"answerKey is {as_json(key)}; it must be one of {', '.join(labels)}")
    return _choose(f"Question: {text_field(row, 'question')}\nAnswer:", texts, labels.index(key))


def _question(row: Row, counts: range) -> Example:
    """Read ``query``, ``choices``, ``gold`` of a task whose prompts begin with "Question: " and end with "Answer:".

    A missing "Answer:" is added. If the query has another form, or the number of choices is not in ``counts``, the
    query does not change, and ``rendered_by_file`` is True.
    """
    example = any_choices(row)
    question = row["query"].removesuffix("\nAnswer:").removesuffix("\n")
    if not question.startswith("Question: ") or question.endswith("Answer:") or len(example.pairs) not in counts:
        return replace(example, rendered_by_file=True)
    return _choose(f"{question}\nAnswer:", row["choices"], example.gold)


def hellaswag(row: Row) -> Example:
    """Read ``activity_label``, ``ctx_a``, ``ctx_b``, ``endings``, ``label``; or ``query``, ``choices``, ``gold``.

    In the first form, the context consists of the first three columns. In this form, markup in brackets, such as
    ``[title]``, is removed from the context and from the endings.
    """
    if "query" in row:
        return replace(any_choices(row), rendered_by_file=True)
    context = f"{text_field(row, 'activity_label')}: {text_field(row, 'ctx_a')} {text_field(row, 'ctx_b').capitalize()}"
    endings = texts_field(row, "endings")
    gold = index_field(row, "label", len(endings))
    return _choose(_without_markup(context), [_without_markup(ending) for ending in endings], gold)


def _without_markup(text: str) -> str:
    """Remove markup such as ``[title]``, which the WikiHow half of HellaSwag contains."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_completion(row: Row) -> Example:
    """Read ``ctx``, ``endings``, ``label``; or ``query``, ``choices``, ``gold``.

    The context is ``ctx`` or ``query``. Markup in brackets is not removed.
    """
    if "query" in row:
        return replace(any_choices(row), rendered_by_file=True)
    endings = texts_field(row, "endings")
    return _choose(text_field(row, "ctx"), endings, index_field(row, "label", len(endings)))


def winogrande(row: Row) -> Example:
    """Read ``sentence``, ``option1``, ``option2``, ``answer``; or ``contexts``, ``continuation``, ``gold``.

    The sentence contains a ``_``. Each context is the text before the ``_``, followed by an option. Only the text after
    the ``_`` is scored (Trinh and Le 2018).
    """
    if "contexts" in row:
        return replace(any_contexts(row), rendered_by_file=True)
    before, blank, after = text_field(row, "sentence").partition("_")
    if not blank:
        raise ValueError("the sentence has no blank _")
    options = (text_field(row, "option1"), text_field(row, "option2"))
    rest = " " + after.strip()
    return Example(
        tuple((before + option, rest) for option in options), index_field(row, "answer", 2, first=1), options
    )


def lambada(row: Row) -> Example:
    """Read ``text``, or instead ``context`` and ``continuation``. The last word of ``text`` is the continuation.

    Few-shot prompts have two spaces before the last word, as in lm-evaluation-harness. If the continuation has
    several words, ``rendered_by_file`` is True, because the row is not in LAMBADA's format.
    """
    if "context" in row:
        context, word = text_field(row, "context"), text_field(row, "continuation").removeprefix(" ")
    else:
        context, space, word = text_field(row, "text").rpartition(" ")
        if not space:
            raise ValueError("the text has no space before its last word")
    return Example(((context, f" {word}"),), solved=f"{context}  {word}", rendered_by_file=" " in word)


@dataclass(frozen=True)
class Settings:
    shots: int = 0
    limit: int | None = None  # score only this number of examples; all if None
    stride: int | None = None  # tokens between the starts of windows over a text; the model's context length if None
    limits: Mapping[str, int] = field(default_factory=dict)  # task -> limit, for tasks with another limit

    def of(self, task: str) -> "Settings":
        """Return the settings for one task. If ``limits`` has a value for the task, this value replaces ``limit``."""
        return replace(self, limit=self.limits.get(task, self.limit), limits={})

    def label(self, task: str) -> str:
        """Return the name for a task's results: ``task``, followed by all options that differ from their defaults."""
        shots = f"_{self.shots}shot" if self.shots else ""
        limit = f"_first{self.limit}" if self.limit else ""
        stride = f"_stride{self.stride}" if self.stride else ""
        return f"{task}{shots}{limit}{stride}"


@dataclass(frozen=True)
class TaskData:
    rows: Rows
    pool: Rows  # the rows from which few-shot examples are drawn
    spare_shot: bool  # the argument ``spare`` of ``draw_shots``
    settings: Settings
    tokenizer: Tokenizer
    context_length: int


def read_examples(data: TaskData, read: Callable[[Row], Example]) -> tuple[list[Example], list[str]]:
    """Convert the rows of a task to examples, and draw few-shot examples.

    Returns:
        The examples, and for each example the text of its few-shot examples. If ``--shots`` is 0, each text is "".

    Raises:
        DataError: a row lacks a column, an answer is empty, or there are too few rows for the few-shot examples.
    """
    examples = _read_rows(data.rows, read, data.settings.limit, require_answers=True)
    if not data.settings.shots:
        return examples, [""] * len(examples)
    shots = draw_shots(examples, _read_rows(data.pool, read, None), data.settings.shots, spare=data.spare_shot)
    return examples, ["".join(shot.shot for shot in drawn) for drawn in shots]


def _read_rows(
    rows: Rows, read: Callable[[Row], Example], limit: int | None, *, require_answers: bool = False
) -> list[Example]:
    examples = []
    for number, row in enumerate(rows.rows[:limit]):
        try:
            example = read(row)
            if require_answers:
                example.require_answers()
            examples.append(example)
        except (KeyError, ValueError) as error:
            reason = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            columns = (read.__doc__ or "").split("\n")[0].removeprefix("Read ").removesuffix(".").replace("``", "")
            raise DataError(
                f"{rows.where(number)} has {list_names(row)} and is no example of this task ({reason}); "
                f"expected {columns}"
            ) from error
    return examples


def draw_shots(
    examples: Sequence[Example], pool: Sequence[Example], count: int, *, spare: bool
) -> list[Sequence[Example]]:
    """Draw ``count`` few-shot examples from ``pool`` for each example to score.

    The seed is fixed, as in lm-evaluation-harness.

    Args:
        spare: whether the pool can contain the example to score. If True, ``count + 1`` examples are drawn. The
            example to score is then removed from them. If it was not drawn, the last example is removed.

    Raises:
        DataError: the pool contains too few examples.
    """
    if len(pool) < count + spare:
        raise DataError(f"--shots {count}: there are only {len(pool) - spare} examples to draw from")
    stream = random.Random(SHOTS_SEED)
    if not spare:
        return [stream.sample(pool, count) for _ in examples]
    shots: list[Sequence[Example]] = []
    for example in examples:
        drawn = [other for other in stream.sample(pool, count + 1) if other != example][:count]
        if len(drawn) < count:  # the pool contains the example several times
            others = [other for other in pool if other != example]
            if len(others) < count:
                raise DataError(f"--shots {count}: there are only {len(others)} other examples to draw from")
            drawn = stream.sample(others, count)
        shots.append(drawn)
    return shots

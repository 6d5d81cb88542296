"""Turn the rows of a dataset into examples and few-shot prompts, as lm-evaluation-harness does."""

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


@dataclass(frozen=True)
class Reader:
    """A function that converts a row to an example.

    Args:
        columns: the columns that ``convert`` needs, as text for error messages.
        convert: raises KeyError if a column is missing, and ValueError if a value is wrong.
    """

    columns: str
    convert: Callable[[Row], Example]

    def __call__(self, row: Row) -> Example:
        return self.convert(row)


def reads(columns: str) -> Callable[[Callable[[Row], Example]], Reader]:
    """Return a decorator that turns a function into a ``Reader`` of these columns."""
    return lambda convert: Reader(columns, convert)


def _choose(context: str, choices: list[str], gold: int) -> Example:
    """Return an example with a space before each choice, as in lm-evaluation-harness."""
    return Example(tuple((context, " " + choice) for choice in choices), gold, tuple(choices))


@reads("query, choices, gold: the context, its continuations, and the index of the right continuation")
def any_choices(row: Row) -> Example:
    """Return the query as the context. Each choice is a continuation, with a space at its beginning."""
    choices = texts_field(row, "choices")
    return _choose(text_field(row, "query"), choices, index_field(row, "gold", len(choices)))


@reads("context and continuation")
def any_continuation(row: Row) -> Example:
    """Return one pair. If no white space separates context and continuation, the continuation gets a space."""
    return Example((_joined(text_field(row, "context"), text_field(row, "continuation")),))


@reads("contexts (a list), continuation, and gold (the index of the right context)")
def any_contexts(row: Row) -> Example:
    """Return a pair per context. If no white space separates it from the continuation, a space is inserted."""
    contexts, continuation = texts_field(row, "contexts"), text_field(row, "continuation")
    pairs = tuple(_joined(context, continuation) for context in contexts)
    return Example(pairs, index_field(row, "gold", len(contexts)), tuple(contexts))


def _joined(context: str, continuation: str) -> tuple[str, str]:
    needs_space = context and not context[-1].isspace() and not continuation[:1].isspace()
    return context, f" {continuation}" if needs_space else continuation


@reads("goal, sol1, sol2, label; or query, choices, gold")
def piqa(row: Row) -> Example:
    """Return the question, followed by "Answer:", as the context."""
    if "query" in row:
        return _question(row, range(2, 3))
    choices = [text_field(row, "sol1"), text_field(row, "sol2")]
    return _choose(f"Question: {text_field(row, 'goal')}\nAnswer:", choices, index_field(row, "label", 2))


@reads("question, choices and answerKey, or else query, choices and gold")
def arc(row: Row) -> Example:
    """Return the question, followed by "Answer:", as the context.

    Beside ``answerKey``, ``choices`` is an object with the lists ``text`` and ``label``.
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


@reads("activity_label, ctx_a, ctx_b, endings, label; or query, choices, gold")
def hellaswag(row: Row) -> Example:
    """Return ``activity_label``, ``ctx_a`` and ``ctx_b`` as the context, without markup such as ``[title]``.

    The markup is also removed from the endings. A ``query`` and its choices do not change.
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


@reads("ctx, endings, label; or query, choices, gold")
def hellaswag_completion(row: Row) -> Example:
    """Return ``ctx`` or ``query`` as the context. Markup in brackets is not removed."""
    if "query" in row:
        return replace(any_choices(row), rendered_by_file=True)
    endings = texts_field(row, "endings")
    return _choose(text_field(row, "ctx"), endings, index_field(row, "label", len(endings)))


@reads("sentence, option1, option2, answer; or contexts, continuation, gold")
def winogrande(row: Row) -> Example:
    """Return a context per option: the text before the ``_`` in the sentence, followed by the option.

    Only the text after the ``_`` is scored (Trinh and Le 2018).
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


@reads("text, or instead context and continuation. The last word of text is the continuation")
def lambada(row: Row) -> Example:
    """Return the last word of the text as the continuation.

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
    """The options of an evaluation that select and build the requests. They are part of the name of the results."""

    shots: int = 0  # few-shot examples before each example
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
    """The rows of a task, and everything else that turns them into requests."""

    rows: Rows
    pool: Rows  # the rows from which few-shot examples are drawn
    spare_shot: bool  # draw one row more, in case the example to score is among them; see ``draw_shots``
    settings: Settings
    tokenizer: Tokenizer
    context_length: int


def read_examples(data: TaskData, read: Reader) -> tuple[list[Example], list[str]]:
    """Convert the rows of a task to examples, and draw few-shot examples.

    Returns:
        The examples, and for each example the text of its few-shot examples. If ``--shots`` is 0, each text is "".

    Raises:
        DataError: a row lacks a column, an answer is empty, or there are too few rows for the few-shot examples.
    """
    examples = read_rows(data.rows, read, data.settings.limit, require_answers=True)
    if not data.settings.shots:
        return examples, [""] * len(examples)
    shots = draw_shots(examples, read_rows(data.pool, read), data.settings.shots, spare=data.spare_shot)
    return examples, ["".join(shot.shot for shot in drawn) for drawn in shots]


def read_rows(rows: Rows, read: Reader, limit: int | None = None, *, require_answers: bool = False) -> list[Example]:
    """Convert the first ``limit`` rows to examples.

    Raises:
        DataError: a row cannot be converted, or its example has an empty answer and ``require_answers`` is True.
    """
    examples = []
    for number, row in enumerate(rows.rows[:limit]):
        try:
            example = read(row)
            if require_answers:
                example.require_answers()
            examples.append(example)
        except (KeyError, ValueError) as error:
            reason = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{rows.where(number)} has {list_names(row)} and is no example of this task ({reason}); "
                f"expected {read.columns}"
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

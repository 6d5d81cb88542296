"""A chat asks the model in the tokens of its training data, and keeps as much of the conversation as fits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from data_tools.encoding.documents import encode_document
from data_tools.sources.instructions import dialogue_of
from data_tools.tokenizer import Tokenizer, load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.config.schema import SampleConfig
from pipeline.generation.chat import Chat
from pipeline.generation.options import Template
from pipeline.generation.text_generator import TextGenerator
from pipeline.model.gpt2 import build_model
from tests.pipeline.conftest import tiny_model_config

CONTEXT = 100
ANSWERS = ["Fine, thanks.", "Bye!", "No."]


class RecordingGenerator(TextGenerator):
    """Records the prompts, and returns ``ANSWERS`` one after the other, word by word."""

    def __init__(self) -> None:
        super().__init__(build_model(tiny_model_config(context_length=CONTEXT), 1), SampleConfig())
        self.prompts: list[list[int]] = []
        self.ends: set[int] = set()

    def stream_tokens(self, prompt: list[int], sample: SampleConfig, seed: int, ends: Any = ()) -> Iterator[str]:
        self.prompts.append(prompt)
        self.ends = set(ends)
        for word in ANSWERS[len(self.prompts) - 1].split(" "):
            yield f"{word} "


@pytest.fixture
def generator() -> RecordingGenerator:
    return RecordingGenerator()


@pytest.fixture
def tokenizer() -> Tokenizer:
    return load_tokenizer()


def trained_on(tokenizer: Tokenizer, record: dict[str, Any]) -> list[int]:
    """Return the tokens that stage 1 makes of a record whose last answer is a marker, up to this answer."""
    tokens = encode_document(tokenizer, dialogue_of(record, "a record")).tokens.tolist()  # type: ignore[arg-type]
    marker = tokenizer.encode("MARKER").tolist()
    assert tokens[-len(marker) :] == marker
    return tokens[: -len(marker)]


def chat_record(*texts: str, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


def talk(generator: RecordingGenerator, *messages: str, template: Template = "messages", **options: Any) -> Chat:
    chat = Chat(generator, SampleConfig(max_new_tokens=20, stop=["own"]), template, **options)
    for message in messages:
        "".join(chat.answer(message, seed=0))
    return chat


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_prompt_of_a_chat_is_what_the_model_was_trained_on(
    generator: RecordingGenerator, tokenizer: Tokenizer, system: str | None
) -> None:
    talk(generator, "How are you?", "Bye", system=system)
    assert generator.prompts == [
        trained_on(tokenizer, chat_record("How are you?", "MARKER", system=system)),
        trained_on(tokenizer, chat_record("How are you?", ANSWERS[0], "Bye", "MARKER", system=system)),
    ]


def test_the_prompt_of_an_instruction_is_what_the_model_was_trained_on(
    generator: RecordingGenerator, tokenizer: Tokenizer
) -> None:
    """Each by itself, because training data has no history."""
    talk(generator, "Add.", "Subtract.", template="instruction")
    assert generator.prompts == [
        trained_on(tokenizer, {"instruction": text, "output": "MARKER"}) for text in ("Add.", "Subtract.")
    ]


def test_an_answer_ends_where_answers_in_training_end(generator: RecordingGenerator, tokenizer: Tokenizer) -> None:
    chat = talk(generator, "Hello")
    last_of_turn = tokenizer.encode("An answer.\n\n").tolist()[-1]
    assert generator.ends == {END_OF_TEXT, last_of_turn}
    assert last_of_turn not in tokenizer.encode("One paragraph.\n\nAnother.").tolist()
    assert {"own", "\n\n### User:", "\n\n### Assistant:"} <= set(chat.sample.stop)
    chat = talk(RecordingGenerator(), "Hello", template="instruction")
    assert {"own", "\n\n### Instruction:"} <= set(chat.sample.stop)


def test_the_oldest_exchanges_are_forgotten_with_a_word(
    generator: RecordingGenerator, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers of 20 tokens leave 80 of the context. The message of the system stays."""
    with caplog.at_level(logging.WARNING):
        talk(generator, "long " * 30, "short", "last " * 20, system="Be brief.")
    assert generator.prompts[2] == trained_on(
        tokenizer, chat_record("short", ANSWERS[1], "last " * 20, "MARKER", system="Be brief.")
    )
    assert "[the context of 100 tokens is full: the oldest exchanges are forgotten (1)]" in caplog.text
    with caplog.at_level(logging.WARNING):
        talk(RecordingGenerator(), "long " * 100)
    assert "no room for the whole message" in caplog.text


def test_an_interrupted_answer_belongs_to_the_conversation(generator: RecordingGenerator, tokenizer: Tokenizer) -> None:
    chat = Chat(generator, SampleConfig(max_new_tokens=20), "messages")
    answer = chat.answer("How are you?", seed=0)
    assert next(answer) == "Fine, "
    answer.close()
    list(chat.answer("Bye", seed=1))
    assert generator.prompts[1] == trained_on(tokenizer, chat_record("How are you?", "Fine,", "Bye", "MARKER"))

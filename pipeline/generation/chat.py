"""Answer messages with a model that was trained on instructions or chats."""

import logging
from collections.abc import Generator

from data_tools.prompt_format import (
    ANSWERING_ROLE,
    END_OF_TURN,
    INSTRUCTION_FIELDS,
    ROLES,
    heading,
    heading_of_role,
    instruction_prompt,
)
from data_tools.vocabulary import END_OF_TEXT
from pipeline.config.schema import SampleConfig
from pipeline.generation.options import Template
from pipeline.generation.text_generator import ENDS, TextGenerator

log = logging.getLogger(__name__)


class Chat:
    """A conversation with a model, in the format of the training data.

    Each message begins with a heading line such as ``### User:``. An answer ends at ``<|endoftext|>`` or before the
    next heading line.

    With the template "messages", the empty line after a message also ends an answer. An empty line between two
    paragraphs does not end it, because it is encoded as other tokens.

    Args:
        template: the kind of training data. With "instruction", the model sees only the last message.
        system: the text of a first message with the role "system", only for "messages".
    """

    def __init__(
        self, generator: TextGenerator, sample: SampleConfig, template: Template, system: str | None = None
    ) -> None:
        assert system is None or template == "messages"
        headings = map(heading_of_role, ROLES) if template == "messages" else map(heading, INSTRUCTION_FIELDS)
        stops = [END_OF_TURN + line.rstrip() for line in headings]
        self.generator = generator
        self.sample = sample.model_copy(update={"stop": [*sample.stop, *stops]})
        self.template = template
        self._system = [] if system is None else self._encode_message("system", system)
        self._ends = ENDS | set(self._encode(END_OF_TURN) if template == "messages" else ())
        self._history: list[list[int]] = []  # the tokens of each finished exchange, oldest first

    def answer(self, message: str, seed: int) -> Generator[str]:
        """Yield the model's answer in pieces of text, each as soon as it is generated."""
        question = self._encode_question(message)
        prompt = [END_OF_TEXT, *self._recall(question), *question]
        answer = ""
        try:
            for piece in self.generator.stream_tokens(prompt, self.sample, seed, self._ends):
                answer += piece
                yield piece
        finally:  # an interrupted answer is also part of the conversation
            if self.template == "messages":
                self._history.append(question + self._encode(answer.strip() + END_OF_TURN))

    def _recall(self, question: list[int]) -> list[int]:
        """Return the tokens of the system message and the earlier exchanges.

        If the context is too short for them and the question, remove the oldest exchanges.
        """
        context = self.generator.model.config.context_length
        room = context - min(self.sample.max_new_tokens, context // 2) - 1 - len(self._system) - len(question)
        forgotten = 0
        while self._history and sum(map(len, self._history)) > room:
            self._history.pop(0)
            forgotten += 1
        if forgotten:
            log.warning(
                "[the context of %d tokens is full: the oldest exchanges are forgotten (%d)]", context, forgotten
            )
        if room < 0:
            log.warning("[the context of %d tokens has no room for the whole message]", context)
        return self._system + [token for exchange in self._history for token in exchange]

    def _encode_question(self, message: str) -> list[int]:
        if self.template == "instruction":
            return self._encode(instruction_prompt(message))
        return self._encode_message("user", message) + self._encode(heading_of_role(ANSWERING_ROLE))

    def _encode_message(self, role: str, text: str) -> list[int]:
        return self._encode(heading_of_role(role)) + self._encode(text + END_OF_TURN)

    def _encode(self, segment: str) -> list[int]:
        """Encode a segment of a document separately from other segments, as the tokenize command does."""
        return self.generator.tokenizer.encode(segment).tolist()

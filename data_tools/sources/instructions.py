"""Read instructions and chats. Only the tokens of the answers count in the loss.

A file contains one record per line, or one JSON array of records. A record is an instruction or a chat:

- An instruction is ``{"instruction": ..., "input": ..., "output": ...}``. ``input`` may be missing or empty.
- A chat is a list of messages ``{"role": "user", "content": ...}``, or an object that contains this list.

Chats may also use the key names of ShareGPT.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from data_tools.encoding.documents import Dialogue
from data_tools.errors import json_type, list_names
from data_tools.prompt_format import ANSWERING_ROLE, END_OF_TURN, ROLES, heading_of_role, instruction_prompt
from data_tools.sources.files import Slice
from data_tools.sources.jsonl import CHAT_FIELDS, ROLE_FIELDS, JsonFileSource, read_records
from data_tools.sources.rows import BadRowError, OnBadRow, parse_rows, stop_at_bad_row

#: Names of ShareGPT, OpenAI and others for the roles of the layout.
_ROLE_OF_NAME = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": ANSWERING_ROLE,
    "model": ANSWERING_ROLE,
    "function_call": ANSWERING_ROLE,
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
_CONTENT_FIELDS = ("content", "value")
#: Fields of messages with text that is not part of the content.
_UNREAD_FIELDS = ("reasoning_content", "reasoning", "thinking")


class InstructionSource(JsonFileSource):
    """Files of instructions and chats."""

    def __init__(self, inputs: Sequence[str]) -> None:
        super().__init__(inputs)

    def read(self, source_slice: Slice, on_bad_row: OnBadRow = stop_at_bad_row) -> Iterator[Dialogue]:
        # The text of a tool call contains the numbers in its arguments.
        rows = read_records(source_slice)
        return parse_rows(rows, lambda row: dialogue_of(row.parse(exact_integers=True), row), on_bad_row)


def dialogue_of(record: Any, place: object) -> Dialogue:
    """Convert an instruction or a chat (a JSON value) to a document. Each message or field gets a heading line.

    Raises:
        BadRowError: the record is not valid, or no message is an answer. The error contains ``str(place)``.
    """
    if isinstance(record, list):
        return Dialogue(tuple(_segments_of_chat(record, place)))
    if not isinstance(record, dict):
        raise BadRowError(place, f"holds {json_type(record)}; it must be a JSON object or a list of messages")
    field = next((name for name in CHAT_FIELDS if name in record), None)
    if field is None:
        return Dialogue(tuple(_segments_of_instruction(record, place)))
    messages = record[field]
    if isinstance(messages, list) and record.get("system"):  # ShareGPT's place for the first message
        messages = [{"role": "system", "content": record["system"]}, *messages]
    return Dialogue(tuple(_segments_of_chat(messages, place)))


def _segments_of_instruction(record: dict[str, Any], place: object) -> Iterator[tuple[str, bool]]:
    if "instruction" not in record or "output" not in record:
        raise BadRowError(
            place,
            f"needs instruction and output (input may be left out), or {' or '.join(CHAT_FIELDS[:2])}; "
            f"the fields are {list_names(record)}",
        )
    for name in ("system", "history"):
        if record.get(name):
            raise BadRowError(place, f"an instruction with {name} is not read; write the record as messages")
    given = {name: record[name] for name in ("instruction", "output")}
    given["input"] = "" if record.get("input") is None else record["input"]
    for name, text in given.items():
        if not isinstance(text, str):
            raise BadRowError(place, f"{name} is {json_type(text)}, it must be a string")
    yield instruction_prompt(given["instruction"], given["input"]), False
    yield given["output"], True


def _segments_of_chat(messages: Any, place: object) -> Iterator[tuple[str, bool]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRowError(place, "messages must be a list of objects with role and content")
    turns = [_turn_of(message, index, place) for index, message in enumerate(messages)]
    if not any(role == ANSWERING_ROLE for role, _ in turns):
        raise BadRowError(place, f"no message has the role {ANSWERING_ROLE}; there is nothing to learn")
    is_scored = [
        role == ANSWERING_ROLE and message.get("weight") != 0
        for message, (role, _) in zip(messages, turns, strict=True)
    ]
    if not any(is_scored):
        raise BadRowError(place, "every answer has the weight 0; there is nothing to learn")
    for index, (role, text) in enumerate(turns):
        is_last = index == len(turns) - 1
        yield heading_of_role(role), False
        # The end of the turn is scored with the answer, so that the model learns where to stop.
        yield text + ("" if is_last else END_OF_TURN), is_scored[index]


def _turn_of(message: dict[str, Any], index: int, place: object) -> tuple[str, str]:
    """Return the role and the text of a message. Each tool call is a line of JSON after the content."""
    name = next((message[field] for field in ROLE_FIELDS if field in message), None)
    role = _ROLE_OF_NAME.get(name) if isinstance(name, str) else None
    if role is None:
        given = "no role" if name is None else f"the role {name!r}"
        raise BadRowError(place, f"message {index} has {given}; it must be one of {', '.join(_ROLE_OF_NAME)}")
    for field in _UNREAD_FIELDS:
        if message.get(field):
            raise BadRowError(place, f"{field} of message {index} is not read; write it into the content, or remove it")
    if message.get("weight") not in (None, 0, 1):
        raise BadRowError(place, f"weight of message {index} is {message['weight']!r}; it must be 0 or 1")
    content = next((message[field] for field in _CONTENT_FIELDS if field in message), None)
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = _join_texts(content, index, place)
    if not isinstance(content, str):
        problem = f"content of message {index} is {json_type(content)}, it must be a string"
        raise BadRowError(place, problem + (" unless there are tool_calls" if content is None else ""))
    return role, "\n".join([*([content] if content or not calls else []), *_lines_of(calls, index, place)])


def _join_texts(items: list[Any], index: int, place: object) -> str:
    """Return the text of a content such as ``[{"type": "text", "text": ...}]``."""
    if not all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in items):
        raise BadRowError(place, f"content of message {index} has items other than text, which are not read")
    return "".join(item["text"] for item in items)


def _lines_of(calls: Any, index: int, place: object) -> list[str]:
    if not isinstance(calls, list):
        raise BadRowError(place, f"tool_calls of message {index} is {json_type(calls)}, it must be a list")
    lines = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(place, f"tool_calls of message {index} must be objects with a name and arguments")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI writes them as JSON in a string
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        try:
            called = {"name": function["name"], "arguments": arguments}
            lines.append(json.dumps(called, ensure_ascii=False, allow_nan=False))
        except ValueError as error:
            problem = "hold NaN, an infinite number or one that is too large, which are not valid JSON"
            raise BadRowError(place, f"tool_calls of message {index} {problem}") from error
    return lines

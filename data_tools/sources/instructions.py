"""Instruction data: what a model is asked and what it is to answer. Only the answers are scored.

A record is ``{"instruction": ..., "input": ..., "output": ...}`` (``input`` may be absent or empty) or a chat,
``{"messages": [{"role": "user", "content": ...}, ...]}``. Files are JSON Lines, or one JSON array.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from data_tools.encoding.documents import Dialogue
from data_tools.errors import DataError
from data_tools.sources.files import decode_utf8, list_files, open_decompressed
from data_tools.sources.jsonl import JSONL_SUFFIXES, read_lines
from data_tools.sources.slices import Slice

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ANSWERING_ROLE = "assistant"
_ROLES = ("system", "user", _ANSWERING_ROLE)
_END_OF_TURN = "\n\n"


class InstructionSource:
    """Files of instructions and chats, laid out as text with headings."""

    def __init__(self, inputs: Sequence[str]) -> None:
        """List the files.

        Raises:
            DataError: an input does not exist.
        """
        self._files = list_files(inputs, JSONL_SUFFIXES)
        self._are_arrays = {path: _is_array(path) for path, _ in self._files.files}

    def options(self) -> dict[str, Any]:
        return self._files.options()

    def text_bytes(self) -> int:
        return self._files.text_bytes()

    def slices(self, slice_bytes: int) -> list[Slice]:
        """Ranges of bytes; a file that is one array is read as a whole."""
        cut = self._files.cut(slice_bytes)
        whole = {path: Slice(path, 0, size, size) for path, size in self._files.files}
        return [
            whole[part.path] if self._are_arrays[part.path] else part
            for part in cut
            if part.start == 0 or not self._are_arrays[part.path]
        ]

    def read(self, part: Slice) -> Iterator[Dialogue]:
        if self._are_arrays[part.path]:
            for index, record in enumerate(_load_array(part.path)):
                yield dialogue_of(record, f"{part.path}: record {index}")
        else:
            for line in read_lines(part):
                try:
                    yield dialogue_of(line.parse(), "")
                except _WrongRecord as error:
                    raise DataError(f"{line.place()}: {error}") from None


class _WrongRecord(DataError):
    """What is wrong with a record; where it stands is found out afterwards."""


def dialogue_of(record: Any, place: str) -> Dialogue:
    """Lay out a record as text with a heading a turn; what the model is to say is scored.

    Args:
        place: where the record stands, for messages; "" leaves it to the caller.

    Raises:
        DataError: it is no object, a field is missing or no string, a role is unknown, or nobody answers.
    """
    try:
        if isinstance(record, dict) and "messages" in record:
            return Dialogue(tuple(_of_messages(record["messages"])))
        return Dialogue(tuple(_of_instruction(record)))
    except _WrongRecord as error:
        if place:
            raise DataError(f"{place}: {error}") from None
        raise


def _of_instruction(record: Any) -> Iterator[tuple[str, bool]]:
    if not isinstance(record, dict) or "instruction" not in record or "output" not in record:
        raise _WrongRecord("needs instruction and output (input may be left out), or messages")
    given = {name: record.get(name, "") for name in ("instruction", "input", "output")}
    for name, text in given.items():
        if not isinstance(text, str):
            raise _WrongRecord(f"{name} is a {type(text).__name__}, it must be a string")
    prompt = _heading("Instruction") + given["instruction"] + _END_OF_TURN
    if given["input"]:
        prompt += _heading("Input") + given["input"] + _END_OF_TURN
    yield prompt + _heading("Response"), False
    yield given["output"], True


def _of_messages(messages: Any) -> Iterator[tuple[str, bool]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _WrongRecord("messages must be a list of objects with role and content")
    if not any(message.get("role") == _ANSWERING_ROLE for message in messages):
        raise _WrongRecord(f"no message has the role {_ANSWERING_ROLE}; there is nothing to learn")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise _WrongRecord(f"message {index} has the role {role!r}; it must be one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise _WrongRecord(f"content of message {index} is a {type(content).__name__}, it must be a string")
        is_last = index == len(messages) - 1
        # The turn's end is scored with the answer: a model has to learn where to stop.
        yield _heading(role.capitalize()), False
        yield content + ("" if is_last else _END_OF_TURN), role == _ANSWERING_ROLE


def _heading(name: str) -> str:
    return f"### {name}:\n"


def _is_array(path: str) -> bool:
    with open_decompressed(path) as file:
        return file.read(64).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _load_array(path: str) -> list[Any]:
    with open_decompressed(path) as file:
        content = file.read().removeprefix(_BYTE_ORDER_MARK)
    text = decode_utf8(content, path, 0)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); it must be an array of objects, or JSON Lines") from error
    assert isinstance(records, list)
    return records

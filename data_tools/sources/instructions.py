"""Read instructions and chats: prompts and answers, of which only the answers are scored.

A record is ``{"instruction": ..., "input": ..., "output": ...}`` (``input`` may be absent or empty) or a chat,
``{"messages": [{"role": "user", "content": ...}, ...]}``. Files are JSON Lines, or one JSON array.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import Any

from data_tools.encoding.documents import Dialogue
from data_tools.errors import DataError, json_type
from data_tools.layout import ANSWERING_ROLE, END_OF_TURN, ROLES, heading_of_role, instruction_prompt
from data_tools.sources.files import FileSource, Slice, decode_utf8, open_decompressed
from data_tools.sources.jsonl import JSONL_SUFFIXES, read_lines


class InstructionSource(FileSource):
    """Files of instructions and chats, laid out as text with headings."""

    def __init__(self, inputs: Sequence[str]) -> None:
        super().__init__(inputs, JSONL_SUFFIXES)
        self._arrays = {path for path, _ in self.files if _is_array(path)}

    def slices(self, slice_bytes: int) -> list[Slice]:
        """Return ranges of bytes. A file that is one JSON array is one slice."""
        sizes = dict(self.files)
        return [
            Slice(piece.path, 0, sizes[piece.path], sizes[piece.path]) if piece.path in self._arrays else piece
            for piece in super().slices(slice_bytes)
            if piece.start == 0 or piece.path not in self._arrays
        ]

    def read(self, piece: Slice) -> Iterator[Dialogue]:
        if piece.path in self._arrays:
            for index, record in enumerate(_load_array(piece.path)):
                yield dialogue_of(record, f"{piece.path}: record {index}")
        else:
            for line in read_lines(piece):
                yield dialogue_of(line.parse(), line)


def dialogue_of(record: Any, place: object) -> Dialogue:
    """Convert a record to text with one heading per turn. Only the answers, which the model has to learn, are scored.

    Args:
        record: a parsed JSON value.
        place: names the record in messages. It is converted to a string only for a message.

    Raises:
        DataError: the record is not an object, a field is missing or not a string, a role is unknown, or no message is
            an answer.
    """
    if isinstance(record, dict) and "messages" in record:
        return Dialogue(tuple(_segments_of_chat(record["messages"], place)))
    return Dialogue(tuple(_segments_of_instruction(record, place)))


def _segments_of_instruction(record: Any, place: object) -> Iterator[tuple[str, bool]]:
    if not isinstance(record, dict) or "instruction" not in record or "output" not in record:
        raise DataError(f"{place}: needs instruction and output (input may be left out), or messages")
    given = {name: record.get(name, "") for name in ("instruction", "input", "output")}
    for name, text in given.items():
        if not isinstance(text, str):
            raise DataError(f"{place}: {name} is {json_type(text)}, it must be a string")
    yield instruction_prompt(given["instruction"], given["input"]), False
    yield given["output"], True


def _segments_of_chat(messages: Any, place: object) -> Iterator[tuple[str, bool]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{place}: messages must be a list of objects with role and content")
    if not any(message.get("role") == ANSWERING_ROLE for message in messages):
        raise DataError(f"{place}: no message has the role {ANSWERING_ROLE}; there is nothing to learn")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"{place}: message {index} has the role {role!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{place}: content of message {index} is {json_type(content)}, it must be a string")
        is_last = index == len(messages) - 1
        yield heading_of_role(role), False
        # The end of the turn is scored with the answer, so that the model learns where to stop.
        yield content + ("" if is_last else END_OF_TURN), role == ANSWERING_ROLE


def _is_array(path: str) -> bool:
    with open_decompressed(path) as file:
        return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _load_array(path: str) -> list[Any]:
    with open_decompressed(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    text = decode_utf8(content, path, 0)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); it must be an array of objects, or JSON Lines") from error
    assert isinstance(records, list)
    return records

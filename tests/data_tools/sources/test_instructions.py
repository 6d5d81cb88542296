"""Check the layout of instruction data, and which of its tokens are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.corpus.run import TokenizeRequest, tokenize_corpus
from data_tools.errors import DataError
from data_tools.shards.manifest import TRAIN_SPLIT
from data_tools.shards.reader import open_split
from data_tools.shards.verification import verify
from data_tools.sources import SourceRequest, open_source
from data_tools.sources.instructions import dialogue_of
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from tests.data_tools.conftest import read_documents

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Name a colour.", "output": "Blue."},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Bye!"},
        ]
    },
]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def tokenized(path: Path, out: Path, **options: Any) -> Path:
    tokenize_corpus(
        TokenizeRequest(source="instructions", inputs=(str(path),), out=out, workers=1, val_fraction=0.0, **options)
    )
    return out


def learned_and_all(folder: Path) -> tuple[str, str]:
    """Return the text of the scored tokens, and of all tokens."""
    stream = open_split(folder, TRAIN_SPLIT)
    tokens = stream.read(0, stream.tokens)
    mask = stream.read_mask_windows(np.array([0]), stream.tokens)[0].astype(bool)
    tokenizer = load_tokenizer()
    return tokenizer.decode(tokens[mask]), tokenizer.decode(tokens)


def test_an_instruction_with_and_without_input() -> None:
    plain, with_input = (dialogue_of(record, "a record").text for record in RECORDS[:2])
    assert plain == "### Instruction:\nName a colour.\n\n### Response:\nBlue."
    assert with_input == "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3"


def test_only_answers_and_their_ends_are_learned(tmp_path: Path) -> None:
    out = tokenized(write_lines(tmp_path / "a.jsonl", RECORDS), tmp_path / "out")
    learned, everything = learned_and_all(out)
    end = "<|endoftext|>"
    assert learned == f"{end}Blue.{end}3{end}Hi.\n\nBye!"
    assert everything.endswith("### User:\nBye\n\n### Assistant:\nBye!")
    assert "Be short." in everything and "Be short." not in learned
    verify(out)


def test_no_token_crosses_from_the_prompt_to_the_answer(tmp_path: Path) -> None:
    """Encode each segment by itself, so that the mask never cuts a token."""
    out = tokenized(write_lines(tmp_path / "a.jsonl", RECORDS[:1]), tmp_path / "out")
    stream, tokenizer = open_split(out, TRAIN_SPLIT), load_tokenizer()
    prompt = tokenizer.encode("### Instruction:\nName a colour.\n\n### Response:\n")
    expected = [END_OF_TEXT, *prompt.tolist(), *tokenizer.encode("Blue.").tolist()]
    assert stream.read(0, stream.tokens).tolist() == expected
    mask = stream.read_mask_windows(np.array([0]), stream.tokens)[0]
    assert mask.tolist() == [1] + [0] * prompt.size + [1] * (stream.tokens - prompt.size - 1)


CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
ANSWER = {"role": "assistant", "content": "Hi."}
CHAT_TEXT = "### System:\nBe short.\n\n### User:\nHello\n\n### Assistant:\nHi."


@pytest.mark.parametrize(
    "record",
    [
        [*CHAT, ANSWER],
        {"messages": [*CHAT, ANSWER], "id": 7},
        {"conversations": [*CHAT, ANSWER]},
        {"conversation": [*CHAT, ANSWER]},
        {
            "system": "Be short.",
            "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}],
        },
        [{"from": "system", "value": "Be short."}, {"from": "user", "value": "Hello"}, {"from": "gpt", "value": "Hi."}],
        [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
            CHAT[1],
            ANSWER,
        ],
    ],
    ids=["list", "messages", "conversations", "conversation", "sharegpt", "sharegpt_list", "openai"],
)
def test_all_shapes_of_a_chat_are_the_same(record: Any) -> None:
    dialogue = dialogue_of(record, "a record")
    assert dialogue.text == CHAT_TEXT
    assert [text for text, is_scored in dialogue.segments if is_scored] == ["Hi."]


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"of": [1, 2]}'}}]},
        {"tool_calls": [{"name": "add", "arguments": {"of": [1, 2]}}]},
        {"function_call": {"name": "add", "arguments": '{"of": [1, 2]}'}},
    ],
)
def test_calls_of_tools_are_answers_and_results_are_not(call: dict[str, Any]) -> None:
    asked = {"role": "assistant", "content": None, **call}
    dialogue = dialogue_of([CHAT[1], asked, {"role": "tool", "content": "3"}, {**ANSWER, **call}], "a record")
    json_of_call = '{"name": "add", "arguments": {"of": [1, 2]}}'
    assert [text for text, is_scored in dialogue.segments if is_scored] == [
        f"{json_of_call}\n\n",
        f"Hi.\n{json_of_call}",
    ]
    assert "### Tool:\n3\n\n" in dialogue.text


@pytest.mark.parametrize("as_array", [False, True])
def test_integers_in_a_call_keep_all_their_digits(tmp_path: Path, as_array: bool) -> None:
    """The fast parser converts integers of more than 64 bits to floats."""
    number = 1234567890123456789012345
    messages = [CHAT[1], {"role": "assistant", "tool_calls": [{"name": "show", "arguments": {"id": number}}]}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": messages}] if as_array else {"messages": messages}))
    [dialogue] = read_documents(open_source(SourceRequest(source="instructions", inputs=(str(path),))))
    assert f'{{"name": "show", "arguments": {{"id": {number}}}}}' in dialogue.text


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, "1e999", "NaN"])
def test_a_number_that_json_cannot_hold_is_refused_in_a_call(tmp_path: Path, number: str, as_array: bool) -> None:
    """Python reads integers of more than 4300 digits as floats, which are infinite."""
    messages = [CHAT[1], {"role": "assistant", "tool_calls": [{"name": "show", "arguments": {"id": 0.5}}]}]
    path = tmp_path / "a.json"
    record = json.dumps({"messages": messages}).replace("0.5", number)
    path.write_text(f"[{record}]" if as_array else record)
    with pytest.raises(DataError, match="tool_calls of message 1 hold NaN, an infinite number or one that is too lar"):
        list(read_documents(open_source(SourceRequest(source="instructions", inputs=(str(path),)))))


@pytest.mark.parametrize("slice_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_lines_that_are_lists_of_messages_are_not_an_array(name: str, slice_bytes: int, tmp_path: Path) -> None:
    path = write_lines(tmp_path / name, [[*CHAT, ANSWER]] * 5)
    source = open_source(SourceRequest(source="instructions", inputs=(str(path),)))
    assert [document.text for document in read_documents(source, slice_bytes)] == [CHAT_TEXT] * 5
    write_lines(path, [[[*CHAT, ANSWER]] * 5])
    source = open_source(SourceRequest(source="instructions", inputs=(str(path),)))
    assert [document.text for document in read_documents(source, slice_bytes)] == [CHAT_TEXT] * 5


def test_an_array_and_lines_are_the_same(tmp_path: Path) -> None:
    lines = tokenized(write_lines(tmp_path / "a.jsonl", RECORDS), tmp_path / "lines")
    array = tmp_path / "a.json"
    array.write_text("\ufeff  " + json.dumps(RECORDS, indent=1), encoding="utf-8")
    assert learned_and_all(tokenized(array, tmp_path / "array")) == learned_and_all(lines)


@pytest.mark.parametrize("slice_bytes", [1, 100, 1 << 20])
def test_any_cut_has_every_record_once(slice_bytes: int, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", RECORDS * 5)
    source = open_source(SourceRequest(source="instructions", inputs=(str(path),)))
    assert list(read_documents(source, slice_bytes)) == [dialogue_of(record, "a record") for record in RECORDS * 5]


def test_an_answer_with_the_weight_0_is_not_scored() -> None:
    chat = [{**ANSWER, "weight": 0}, {**ANSWER, "weight": 1}, {**ANSWER, "weight": None}]
    assert [is_scored for _, is_scored in dialogue_of(chat, "a record").segments[1::2]] == [False, True, True]


def test_an_input_of_null_is_left_out() -> None:
    assert dialogue_of({**RECORDS[0], "input": None}, "a record") == dialogue_of(RECORDS[0], "a record")


def test_arrow_shards_have_masks_too(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", RECORDS)
    arrow, npy = (tokenized(path, tmp_path / format, format=format) for format in ("arrow", "npy"))
    assert learned_and_all(arrow) == learned_and_all(npy)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"instruction": "a"}, "needs instruction and output"),
        ("text", "holds a string; it must be a JSON object or a list of messages"),
        ({"instruction": "a", "output": 3}, "output is a number, it must be a string"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message has the role assistant"),
        ({"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}, "role 'robot'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content of message 0 is null.* unless .* tool_calls"),
        ({"prompt": "a", "completion": "b"}, "needs instruction .* or messages .*; the fields are prompt, completion"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "an instruction with history is not read"),
        ([{**ANSWER, "content": [{"type": "image_url"}]}], "content of message 0 has items other than text"),
        ([{**ANSWER, "tool_calls": "add"}], "tool_calls of message 0 is a string, it must be a list"),
        ([{**ANSWER, "tool_calls": [{"id": 1}]}], "tool_calls of message 0 must be objects with a name"),
        ([{"text": "a"}], "message 0 has no role; it must be one of system, user"),
        ([{**ANSWER, "reasoning_content": "a"}], "reasoning_content of message 0 is not read; write it into"),
        ([{**ANSWER, "weight": 0}], "every answer has the weight 0"),
        ([{**ANSWER, "weight": 0.5}], "weight of message 0 is 0.5; it must be 0 or 1"),
    ],
)
def test_a_wrong_record_is_named(record: Any, problem: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [RECORDS[0], record])
    with pytest.raises(DataError, match=problem) as raised:
        tokenized(path, tmp_path / "out")
    assert str(raised.value).startswith(f"{path}:2: ")
    assert not (tmp_path / "out").exists()


def test_a_wrong_record_of_an_array_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([RECORDS[0], {"output": "b"}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json: record 1: needs instruction and output"):
        tokenized(tmp_path / "a.json", tmp_path / "out")

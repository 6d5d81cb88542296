"""The indexed datasets of Megatron-LM are read as streams of documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_tools.errors import DataError
from data_tools.formats.conversion import convert
from data_tools.formats.opening import open_collection
from data_tools.formats.plan import ConvertRequest
from tests.support.token_files import (
    END,
    few_examples,
    put,
    small_pieces,
    token_ids,
    totals,
    utf8_bytes_of,
    write_megatron,
)

megatron_documents = st.lists(st.lists(st.lists(token_ids, max_size=6), max_size=3), max_size=12)


class TestMegatron:
    @few_examples
    @given(
        corpus=megatron_documents,
        append_eod=st.booleans(),
        wide=st.booleans(),
        reads=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=6),
    )
    def test_each_document_follows_an_end_of_text(
        self, corpus: list[list[list[int]]], append_eod: bool, wide: bool, reads: list[tuple[int, int]]
    ) -> None:
        assume(any(sequence for document in corpus for sequence in document))
        expected: list[int] = []
        for document in corpus:
            text = [token for sequence in document for token in sequence]
            if append_eod and document:
                text.append(END)
            expected += [END, *(text[:-1] if text[-1:] == [END] else text)]
        with small_pieces() as folder:
            dtype, code = ("<i4", 4) if wide else ("<u2", 8)
            write_megatron(folder / "my_text_document", corpus, dtype, code, append_eod)
            stream = open_collection(folder / "my_text_document").splits["train"].stream
            assert stream.read(0, stream.tokens).tolist() == expected
            for start, stop in reads:
                start, stop = sorted((min(start, len(expected)), min(stop, len(expected))))
                assert stream.read(start, stop - start).tolist() == expected[start:stop]
            convert(
                ConvertRequest(source=folder / "my_text_document.bin", out=folder / "out", to="arrow", shard_tokens=20)
            )
            assert totals(folder / "out") == {"train": (expected, expected.count(END), utf8_bytes_of(expected))}

    def test_pairs_of_a_folder_are_concatenated(self, tmp_path: Path) -> None:
        write_megatron(tmp_path / "b_train", [[[1, 2]]])
        write_megatron(tmp_path / "a_train", [[[3], [4]]], append_eod=True)
        write_megatron(tmp_path / "valid", [[[5]]])
        splits = open_collection(tmp_path).splits
        found = {name: split.stream.read(0, split.stream.tokens).tolist() for name, split in splits.items()}
        assert found == {"train": [END, 3, 4, END, 1, 2], "val": [END, 5]}


def test_a_wide_token_is_not_wrapped_into_the_vocabulary(tmp_path: Path) -> None:
    write_megatron(tmp_path / "x", [[[1, 65536 + 7]]], "<i4", 4)
    for damage in (65536 + 7, -1):
        put("x.bin", 4, "<i", damage)(tmp_path)
        with pytest.raises(DataError, match=rf"x\.bin holds token {damage}, the vocabulary ends at 50256"):
            convert(ConvertRequest(source=tmp_path / "x", out=tmp_path / "out", to="npy"))

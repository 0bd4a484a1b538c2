"""Plain text beside the data of a stage: chunks, what is trained of them, and an order that can be gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkit.data.pretraining import PretrainingStream, encode_documents
from alignkit.data.records import documents
from alignkit.data.sources import FileConfig
from alignkit.errors import DataError
from alignkit.interfaces import Row
from alignkit.models.tiny import byte_codec
from alignkit.settings import Component
from alignkit.testing import make_context
from alignkit.types import Document

CODEC = byte_codec()


def stream(folder: Path, texts: list[str], **options: int) -> PretrainingStream:
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    data = Component("jsonl", FileConfig(path=str(file)))
    return PretrainingStream(make_context(folder, seed=3), data, CODEC, max_length=options.get("max_length", 4), name="ptx")


def test_a_text_is_cut_to_chunks_and_all_but_each_first_token_is_trained() -> None:
    chunks = encode_documents(CODEC, [Document("d", "abcdefg"), Document("e", "xy")], max_length=4)
    assert [chunk.id for chunk in chunks] == ["d", "d#2", "e"]
    assert [CODEC.decode(chunk.ids) for chunk in chunks] == ["abcd", "efg", "xy"]  # no stop token behind any of them
    assert [chunk.loss_mask for chunk in chunks] == [(False, True, True, True), (False, True, True), (False, True)]


def test_a_single_token_that_remains_predicts_nothing_and_is_left_out() -> None:
    assert [chunk.id for chunk in encode_documents(CODEC, [Document("d", "abcde")], max_length=4)] == ["d"]


@pytest.mark.parametrize("text", ["", "  \n", None, 7])
def test_a_row_without_text_is_named(text: object) -> None:
    with pytest.raises(DataError, match=r"corpus\.jsonl:3: "):
        documents([Row({"text": text}, "corpus.jsonl:3")])


def test_texts_without_anything_to_predict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ptx: none of the 2 texts has two tokens or more"):
        stream(tmp_path, ["a", "b"])


def test_each_chunk_comes_once_an_epoch_and_a_restored_stream_goes_on(tmp_path: Path) -> None:
    texts = ["ab", "cd", "ef", "gh", "ij"]
    whole = [chunk.id for chunk in stream(tmp_path, texts).take(10)]
    assert sorted(whole[:5]) == sorted(whole[5:])
    assert len(set(whole[:5])) == 5

    first = stream(tmp_path, texts)
    begun = [chunk.id for chunk in first.take(3)]
    second = stream(tmp_path, texts)
    second.load_state(first.state())
    assert begun + [chunk.id for chunk in second.take(7)] == whole

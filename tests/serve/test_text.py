"""Text as it streams, against a reference that looks at every character: any tokens, any stop strings, any end."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alignkit.data.codec import TemplateCodec
from alignkit.models.tiny import byte_codec
from alignkit_serve.engine import Finish, Piece, Token
from alignkit_serve.text import TextStream, TokenBytes

SENTENCES = (
    "The film was good, the film was very good, and the end of the film was not.",
    "Straße, naïve, cafe\u0301, e\u0301te\u0301, Zu\u0308rich: letters with and without combining marks, नमस्ते दुनिया।",
    "电影很好看，电影非常好看，结尾不好看。我们再看一次电影吧。",
    "😀 😃 😄 👩‍👩‍👧 👍🏽 🏳️‍🌈 😀😀😀 👍🏽👍🏽",
    "User: stop\n\nAssistant: \ufffd is a character too.\n\nUser: \u2028 and \r\n as well.\n\n",
)


@functools.cache
def merged_codec() -> TemplateCodec:
    """Its tokens are words, parts of words, parts of characters, and ends of one with the beginning of the next."""
    core = Tokenizer(models.BPE())
    # Without a regular expression that splits words, merges go over spaces and from one character into the next.
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<|end|>", "<|pad|>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([sentence[:length] for sentence in SENTENCES for length in (20, 40, 80)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    return TemplateCodec(tokenizer, (tokenizer.eos_token_id,))


CODECS = {"bytes": functools.cache(byte_codec), "merged": merged_codec}


@dataclass(frozen=True)
class Answer:
    """What a policy may draw: tokens, then, if ``end`` is "stop", a stop token."""

    ids: tuple[int, ...]
    stop: tuple[str, ...]
    end: Finish


TEXT = st.text(alphabet=sorted(set("".join(SENTENCES))), max_size=8) | st.text(max_size=4)


@st.composite
def answers(draw: st.DrawFn, codec: TemplateCodec, *, stops: int = 4) -> Answer:
    tokenizer = codec.tokenizer
    real = TEXT.map(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    any_ids = st.lists(st.integers(0, len(tokenizer) - 1).filter(lambda id: id not in codec.stop_ids), max_size=6)
    ids = [id for some in draw(st.lists(real | any_ids, max_size=6)) for id in some if id not in codec.stop_ids]
    text = codec.decode(ids)
    return Answer(tuple(ids), tuple(draw(st.lists(stop_strings(text), max_size=stops))), draw(st.sampled_from(["length", "stop"])))


@st.composite
def stop_strings(draw: st.DrawFn, text: str) -> str:
    """Mostly a piece of the text, or one with more behind it: those that are prefixes of each other and overlap come by themselves."""
    start = draw(st.integers(0, max(0, len(text) - 1)))
    length = draw(st.integers(0, 6))
    return text[start : start + length] + draw(st.sampled_from(["", "", "x", " ", "\ufffd"])) or draw(st.text(min_size=1, max_size=3))


def streamed(codec: TemplateCodec, answer: Answer) -> list[Piece]:
    """The pieces until one is the last. There is always at least one token."""
    stream, pieces = TextStream(codec.tokenizer, answer.stop), []
    ids = answer.ids if answer.end == "length" and answer.ids else (*answer.ids, codec.stop_ids[0])
    for number, id in enumerate(ids, start=1):
        finished: Finish | None = None if number < len(ids) else "stop" if id in codec.stop_ids else "length"
        pieces.append(stream.take(Token(id, b"", 0.0, 0.0), finished))
        if pieces[-1].finished:
            break
    return pieces


def expected(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first, the longest of those that are complete at once; and whether there is one."""
    for end in range(1, len(text) + 1):
        if complete := [one for one in stop if text[:end].endswith(one)]:
            return text[: end - max(map(len, complete))], True
    return text, False


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def ids_of(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens if token.id is not None]


some_answers = pytest.mark.parametrize("name", sorted(CODECS))


@some_answers
@given(data=st.data())
@settings(max_examples=600)
def test_the_streamed_text_is_the_text_up_to_the_first_complete_stop(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]()
    answer = data.draw(answers(codec))
    pieces = streamed(codec, answer)
    want, stopped = expected(codec.decode(answer.ids), answer.stop)
    assert text_of(pieces) == want
    assert pieces[-1].finished == ("stop" if stopped or answer.end == "stop" or not answer.ids else "length")
    assert all(piece.finished is None for piece in pieces[:-1])


@some_answers
@given(data=st.data())
@settings(max_examples=300)
def test_without_stops_it_is_what_the_tokenizer_decodes(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]()
    answer = data.draw(answers(codec, stops=0))
    pieces = streamed(codec, answer)
    assert text_of(pieces) == codec.decode(answer.ids)
    assert ids_of([token for piece in pieces for token in piece.drawn])[: len(answer.ids)] == list(answer.ids)


@some_answers
@given(data=st.data())
@settings(max_examples=300)
def test_no_more_is_held_back_than_may_be_the_beginning_of_a_stop_or_part_of_a_character(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]()
    answer = data.draw(answers(codec))
    shown = ""
    for number, piece in enumerate(streamed(codec, answer)[:-1], start=1):
        shown += piece.text
        # What ends in an incomplete character is text only up to there.
        there = codec.decode(answer.ids[:number])
        assert there.startswith(shown)
        held = there[len(shown) :]
        assert held.endswith("\ufffd") or not held or any(one.startswith(held) for one in answer.stop)


@some_answers
@given(data=st.data())
@settings(max_examples=300)
def test_the_tokens_shown_are_the_first_drawn_and_cover_the_text(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]()
    answer = data.draw(answers(codec))
    shown: list[int] = []
    drawn: list[int] = []
    text = ""
    for piece in streamed(codec, answer):
        text += piece.text
        shown += ids_of(piece.shown)
        drawn += ids_of(piece.drawn)
        assert shown == drawn[: len(shown)]
        assert codec.decode(shown).startswith(text.rstrip("\ufffd"))
    if codec.decode(answer.ids) != text:
        # The text was cut: no token is listed that begins behind the cut. A token begins where the whole characters before it end.
        begins, there = [], 0
        for number in range(min(len(drawn), len(answer.ids))):  # a stop token has no text
            before = codec.decode(drawn[:number])
            there = there if before.endswith("\ufffd") else len(before)
            begins.append(there)
        assert len(shown) == sum(begin < len(text) for begin in begins)


@given(text=st.lists(TEXT, max_size=6).map("".join), data=st.data())
@settings(max_examples=300)
def test_it_does_not_matter_how_the_text_was_split_into_tokens(text: str, data: st.DataObject) -> None:
    codec = CODECS["merged"]()
    stop = tuple(data.draw(st.lists(stop_strings(text), max_size=4)))
    merged = codec.tokenizer(text, add_special_tokens=False).input_ids
    split = [piece for id in merged for piece in (pieces_of(codec, id) if data.draw(st.booleans()) else [id])]
    of_bytes = CODECS["bytes"]().tokenizer(text, add_special_tokens=False).input_ids
    found = {
        text_of(streamed(CODECS[name](), Answer(tuple(ids), stop, "length")))
        for name, ids in (("merged", merged), ("merged", split), ("bytes", of_bytes))
    }
    assert found == {expected(text, stop)[0]}


def pieces_of(codec: TemplateCodec, id: int) -> list[int]:
    """The tokens of single bytes that a token is made of."""
    ids: list[int] = codec.tokenizer.convert_tokens_to_ids(list(codec.tokenizer.convert_ids_to_tokens(id)))
    return ids


@some_answers
@given(data=st.data())
@settings(max_examples=300)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]()
    bytes_of = TokenBytes(codec.tokenizer)
    special = set(codec.tokenizer.all_special_ids)
    text = data.draw(st.lists(TEXT, max_size=4).map("".join))
    assert b"".join(bytes_of(id) for id in codec.tokenizer(text, add_special_tokens=False).input_ids) == text.encode()
    ids = data.draw(answers(codec)).ids
    assert b"".join(bytes_of(id) for id in ids if id not in special).decode(errors="replace") == codec.decode(ids)


def stream(codec: TemplateCodec, text: str, *stop: str) -> list[str]:
    ids = codec.tokenizer(text, add_special_tokens=False).input_ids
    return [piece.text for piece in streamed(codec, Answer(tuple(ids), stop, "length"))]


def test_worked_by_hand() -> None:
    codec = CODECS["bytes"]()
    assert stream(codec, "ab") == ["a", "b"]
    assert stream(codec, "a😀b") == ["a", "", "", "", "😀", "b"]
    assert stream(codec, "abcd", "bcx") == ["a", "", "", "bcd"]
    assert stream(codec, "abcd", "bc") == ["a", "", ""]
    assert stream(codec, "abcd", "c", "bc", "abc") == ["", "", ""]
    assert stream(codec, "aab", "ab") == ["", "a", ""]
    assert stream(codec, "ab", "abc") == ["", "ab"]

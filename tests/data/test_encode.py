"""Rows that are too long: refused, dropped or cut, never silently, and never with an end that was not there."""

from __future__ import annotations

import json

import pytest

from alignkit.data.encode import encode_demonstrations, encode_prompts, encode_rankings
from alignkit.data.records import prompts
from alignkit.errors import DataError
from alignkit.interfaces import Row
from alignkit.types import Demonstration, Message, Prompt, Ranking
from tests.data.chat import STOP, codec, merging_codec, plain, trained, turns

CODEC = codec()


def demonstration(name: str, prompt: str, completion: str) -> Demonstration:
    return Demonstration(plain(prompt, name), (Message("assistant", completion),))


# One token a byte, and the stop token: 4, 9 and 11 tokens.
SHORT, LONG, ALL_PROMPT = demonstration("short", "a", "bc"), demonstration("long", "abc", "defgh"), demonstration("all", "abcdefgh", "ij")


def test_rows_that_fit_are_kept_as_they_are() -> None:
    found = encode_demonstrations(CODEC, [SHORT, LONG], max_length=9, overlong="error")
    assert found.rows == (CODEC.demonstration(SHORT), CODEC.demonstration(LONG))
    assert found.report.as_json() == {
        "kept": 2, "truncated": 0, "dropped": 0, "merged": 0, "truncated_ids": [], "dropped_ids": [], "merged_ids": [],
        "tokens": 13, "longest": 9,
    }  # fmt: skip


def test_a_row_that_is_too_long_is_an_error_with_the_three_choices() -> None:
    with pytest.raises(DataError) as caught:
        encode_demonstrations(CODEC, [SHORT, LONG], max_length=8, overlong="error")
    assert str(caught.value) == (
        "demonstration 'long' (abc): it has 9 tokens, more than max_length 8; "
        "raise max_length, or set overlong: drop or overlong: truncate (both are counted in the manifest)"
    )


def test_dropped_rows_are_named() -> None:
    found = encode_demonstrations(CODEC, [SHORT, LONG, ALL_PROMPT], max_length=8, overlong="drop")
    assert [row.id for row in found.rows] == ["short"]
    assert (found.report.kept, found.report.truncated, found.report.dropped) == (1, (), ("long", "all"))


def test_a_demonstration_loses_its_end_and_gets_no_other() -> None:
    found = encode_demonstrations(CODEC, [SHORT, LONG, ALL_PROMPT], max_length=8, overlong="truncate")
    assert [row.id for row in found.rows] == ["short", "long"]
    cut = found.rows[1]
    assert cut.ids == CODEC.demonstration(LONG).ids[:8]
    assert STOP not in cut.ids
    assert trained(CODEC, cut) == ["defgh"]
    # Eight tokens of "all" are its prompt: nothing of it could be trained.
    assert (found.report.kept, found.report.truncated, found.report.dropped) == (1, ("long",), ("all",))
    json.dumps(found.report.as_json())


def test_demonstrations_whose_border_lies_inside_a_token_are_named() -> None:
    each = merging_codec()
    merged, clean = demonstration("merged", "is th", "e theme"), demonstration("clean", "is the", " theme")
    report = encode_demonstrations(each, [merged, clean], max_length=20, overlong="error").report
    assert (report.kept, report.merged) == (2, ("merged",))
    chat = Demonstration(Prompt("chat", turns("is th")), turns("e theme", first="assistant"))
    assert encode_demonstrations(CODEC, [chat], max_length=90, overlong="error").report.merged == ()


def test_a_ranking_loses_the_same_beginning_of_its_prompt_for_every_response() -> None:
    ranking = Ranking(plain("abcdef", "r"), ("x", "yyy"), (1, 2))
    found = encode_rankings(CODEC, [ranking], max_length=7, overlong="truncate")
    # The longer row has 6 + 3 + 1 tokens, three too many; the shorter one loses as many.
    assert [CODEC.shown(row.ids) for row in found.rows[0].rows] == ["defx<|im_end|>", "defyyy<|im_end|>"]
    assert [trained(CODEC, row) for row in found.rows[0].rows] == [["x<|im_end|>"], ["yyy<|im_end|>"]]
    assert found.report.as_json()["truncated_ids"] == ["r"]


@pytest.mark.parametrize(("max_length", "kept"), [(5, 1), (4, 0)])
def test_a_ranking_whose_response_leaves_no_room_for_a_prompt_is_dropped(max_length: int, kept: int) -> None:
    found = encode_rankings(CODEC, [Ranking(plain("abcdef", "r"), ("x", "yyy"), (1, 2))], max_length=max_length, overlong="truncate")
    assert (len(found.rows), found.report.dropped) == (kept, () if kept else ("r",))


@pytest.mark.parametrize(("max_length", "kept"), [(5, 1), (4, 0)])
def test_a_response_that_is_merged_with_the_end_of_its_prompt_is_not_cut_either(max_length: int, kept: int) -> None:
    # "is| the|..." and "is| th|...": one response begins a token earlier than the other.
    each = merging_codec()
    ranking = Ranking(plain("is th", "r"), ("e theme", " further there"), (1, 2))
    starts = [row.loss_mask.index(True) for row in each.ranked(ranking).rows]
    found = encode_rankings(each, [ranking], max_length=max_length, overlong="truncate")
    assert (starts, len(found.rows)) == ([1, 2], kept)


def test_a_prompt_loses_its_beginning() -> None:
    found = encode_prompts(CODEC, [plain("abcdef")], max_length=4, overlong="truncate")
    assert CODEC.shown(found.rows[0].ids) == "cdef"
    assert found.rows[0].prompt == plain("abcdef")
    chat = encode_prompts(CODEC, [Prompt("p", turns("Hello"))], max_length=30, overlong="truncate")
    assert CODEC.shown(chat.rows[0].ids).endswith("<|im_start|>assistant\n")


RANKING = Ranking(plain("abcdef", "r"), ("x", "yyy"), (1, 2))  # rows of 8 and 10 tokens
SMALL = Ranking(plain("a", "s"), ("x", "y"), (1, 1))  # two rows of 3 tokens


def test_a_ranking_is_as_long_as_its_longest_response() -> None:
    assert encode_rankings(CODEC, [RANKING], max_length=10, overlong="error").rows == (CODEC.ranked(RANKING),)
    with pytest.raises(DataError, match=r"^ranking 'r' \(abcdef\): it has 10 tokens, more than max_length 9; raise max_length"):
        encode_rankings(CODEC, [RANKING], max_length=9, overlong="error")


def test_a_dropped_ranking_takes_all_its_responses_along() -> None:
    found = encode_rankings(CODEC, [RANKING, SMALL], max_length=9, overlong="drop")
    assert [row.id for row in found.rows] == ["s"]
    assert found.report.as_json() == {
        "kept": 1, "truncated": 0, "dropped": 1, "merged": 0, "truncated_ids": [], "dropped_ids": ["r"], "merged_ids": [],
        "tokens": 6, "longest": 3,
    }  # fmt: skip


def test_a_prompt_that_is_too_long_is_refused_or_dropped() -> None:
    with pytest.raises(DataError, match=r"^prompt 'p' \(abcdef\): it has 6 tokens, more than max_length 5"):
        encode_prompts(CODEC, [plain("abcdef")], max_length=5, overlong="error")
    found = encode_prompts(CODEC, [plain("abcdef"), plain("ab", "q")], max_length=5, overlong="drop")
    assert [row.prompt.id for row in found.rows] == ["q"]
    assert (found.report.kept, found.report.dropped, found.report.tokens) == (1, ("p",), 2)


def test_a_cut_inside_a_turn_that_is_not_trained_leaves_nothing_of_that_turn() -> None:
    prompt, completion = Prompt("d", turns("Hi")), turns("Hello!", "And what else?", "Bye.", first="assistant")
    whole = CODEC.demonstration(Demonstration(prompt, completion))
    first = CODEC.demonstration(Demonstration(prompt, completion[:1]))
    (cut,) = encode_demonstrations(CODEC, [Demonstration(prompt, completion)], max_length=len(whole) - 20, overlong="truncate").rows
    assert cut == first
    assert trained(CODEC, cut) == ["Hello!<|im_end|>"]


def test_a_prompt_of_no_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="it has no token at all"):
        encode_prompts(CODEC, [plain("")], max_length=5, overlong="error")


def test_what_the_codec_refuses_names_the_record() -> None:
    with pytest.raises(DataError, match=r"^prompt 'p' \(Hi\): the data holds conversations, but .* no chat template"):
        encode_prompts(codec(None), [Prompt("p", turns("Hi"))], max_length=8, overlong="error")


def test_a_row_that_is_too_long_is_found_by_its_file_and_line() -> None:
    (prompt,) = prompts([Row({"prompt": "far too long for this"}, "data/prompts.jsonl:12")])
    with pytest.raises(DataError, match=r"^data/prompts\.jsonl:12: prompt .* more than max_length 4; raise max_length"):
        encode_prompts(CODEC, [prompt], max_length=4, overlong="error")

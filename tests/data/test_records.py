"""The forms that rows may have, and what is said about rows that have none of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.records import demonstrations, documents, fingerprint, prompts, rankings
from alignkit.errors import DataError
from alignkit.interfaces import Row
from alignkit.types import Message

USER, YES, NO = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "S"}
Q, S, A = Message("user", "Q"), Message("system", "S"), Message("assistant", "yes")
DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
Read = Callable[[Sequence[Row]], Sequence[Any]]


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(each, f"x.jsonl:{number}") for number, each in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("row", "prompt", "plain", "completion"),
    [
        ({"prompt": "Q", "completion": " yes"}, (Q,), True, (Message("assistant", " yes"),)),
        ({"prompt": [USER], "completion": [YES]}, (Q,), False, (A,)),
        ({"prompt": [USER], "completion": [YES, USER, NO]}, (Q,), False, (A, Q, Message("assistant", "no"))),
        ({"messages": [SYSTEM, USER, YES, USER, NO]}, (S, Q), False, (A, Q, Message("assistant", "no"))),
        ({"messages": [USER, YES], "prompt": "Q"}, (Q,), False, (A,)),
        ({"messages": None, "prompt": "Q", "completion": "yes"}, (Q,), True, (A,)),
    ],
)
def test_forms_of_demonstrations(row: dict[str, Any], prompt: object, plain: bool, completion: object) -> None:
    (found,) = demonstrations(rows(row))
    assert (found.prompt.messages, found.prompt.plain, found.completion) == (prompt, plain, completion)


@pytest.mark.parametrize(
    ("row", "prompt", "plain", "responses", "ranks"),
    [
        ({"prompt": "Q", "chosen": "yes", "rejected": "no"}, (Q,), True, ("yes", "no"), (1, 2)),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, (Q,), False, ("yes", "no"), (1, 2)),
        ({"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}, (S, Q), False, ("yes", "no"), (1, 2)),
        ({"prompt": None, "chosen": [USER, YES], "rejected": [USER, NO]}, (Q,), False, ("yes", "no"), (1, 2)),
        ({"prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO]}, (Q,), False, ("yes", "no"), (1, 2)),
        ({"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}, (Q,), False, ("yes", "no"), (1, 2)),
        ({"prompt": "Q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}, (Q,), True, ("a", "b", "c"), (2, 1, 2)),
        ({"prompt": [USER], "responses": ["a", [YES]], "ranks": [1, 1]}, (Q,), False, ("a", "yes"), (1, 1)),
        ({"prompt": "Q", "responses": list("abcdefghi"), "ranks": list(range(1, 10))}, (Q,), True, tuple("abcdefghi"), tuple(range(1, 10))),
    ],
)
def test_forms_of_rankings(row: dict[str, Any], prompt: object, plain: bool, responses: object, ranks: object) -> None:
    (found,) = rankings(rows(row))
    assert (found.prompt.messages, found.prompt.plain, found.responses, found.ranks) == (prompt, plain, responses, ranks)
    assert (found.labeler, found.weight, found.margin, found.preference) == (None, 1.0, 0.0, None)


def test_what_else_is_known_about_a_ranking() -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "labeler": 7, "weight": 2, "topic": "t"}
    (certain,) = rankings(rows({**row, "margin": 0.5}))
    assert (certain.labeler, certain.weight, certain.margin, certain.preference) == ("7", 2.0, 0.5, None)
    assert certain.prompt.metadata == {"topic": "t"}
    (uncertain,) = rankings(rows({**row, "preference": 0.75}))
    assert (uncertain.margin, uncertain.preference) == (0.0, 0.75)
    with pytest.raises(DataError, match=r"x\.jsonl:1: margin and preference are given together"):
        rankings(rows({**row, "margin": 0.5, "preference": 0.75}))


@pytest.mark.parametrize(
    ("row", "messages", "plain"),
    [
        ({"prompt": "Q"}, (Q,), True),
        ({"prompt": [SYSTEM, USER]}, (S, Q), False),
        ({"messages": [USER, YES, USER]}, (Q, A, Q), False),
        ({"prompt": None, "messages": [USER]}, (Q,), False),
    ],
)
def test_forms_of_prompts(row: dict[str, Any], messages: object, plain: bool) -> None:
    (found,) = prompts(rows(row))
    assert (found.messages, found.plain) == (messages, plain)


def test_the_rows_in_the_documentation_have_the_forms_they_stand_for() -> None:
    examples = re.findall(r"^```json\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    reads: list[Read] = [demonstrations, rankings, prompts, documents]
    found = [read(rows(*map(json.loads, lines.splitlines()))) for read, lines in zip(reads, examples, strict=True)]
    assert [len(records) for records in found] == [3, 3, 2, 1]


def test_columns_that_a_form_does_not_read_are_metadata() -> None:
    (found,) = prompts(rows({"id": "x", "prompt": "Q", "completion": "gold", "topic": ["t"]}))
    assert found.metadata == {"completion": "gold", "topic": ["t"]}


def test_ids_are_the_rows_own_or_follow_from_the_prompt() -> None:
    values: list[dict[str, Any]] = [
        {"prompt": "Q"},
        {"prompt": "R"},
        {"id": 7, "prompt": "Q"},
        {"prompt": "Q"},
        {"id": None, "prompt": "Q"},
    ]
    first, other, own, second, third = (prompt.id for prompt in prompts(rows(*values)))
    # printf '[["user", "Q"]]' | sha256sum | head -c 16
    assert first == "09765970e66b010a"
    assert (own, second, third) == ("7", f"{first}-2", f"{first}-3")
    assert other != first
    assert prompts(rows({"prompt": "R"}))[0].id == other


def test_an_id_that_follows_from_the_prompt_gives_way_to_a_row_that_has_it_for_its_own() -> None:
    made = "09765970e66b010a"
    values: list[dict[str, Any]] = [{"id": made, "prompt": "Z"}, {"id": f"{made}-2", "prompt": "Y"}, {"prompt": "Q"}]
    assert [prompt.id for prompt in prompts(rows(*values))] == [made, f"{made}-2", f"{made}-3"]
    with pytest.raises(DataError, match=rf"x\.jsonl:2: the id '{made}' is taken by x\.jsonl:1"):
        prompts(rows({"prompt": "Q"}, {"id": made, "prompt": "Z"}))


def test_a_column_that_is_null_is_not_there() -> None:
    (bare,), (filled,) = (prompts(rows({"prompt": "Q", **more})) for more in ({}, {"topic": None, "facts": {"a": None, "b": [None, 1]}}))
    assert (bare.metadata, filled.metadata) == ({}, {"facts": {"b": [None, 1]}})
    assert fingerprint(rows({"prompt": "Q", "topic": None})) == fingerprint(rows({"prompt": "Q"}))
    assert fingerprint(rows({"prompt": "Q", "n": [None]})) != fingerprint(rows({"prompt": "Q", "n": []}))


NOT_HELD = "chosen and rejected are whole conversations, and the prompt beside them is not in them"
BAD: list[tuple[Read, dict[str, Any], str]] = [
    (demonstrations, {"text": "a"}, "the columns are text; needed: prompt + completion; or messages"),
    (demonstrations, {}, "the columns are none; needed: prompt + completion; or messages"),
    (demonstrations, {"prompt": "a", "completion": None}, "the columns are prompt, completion (completion is null); needed"),
    (demonstrations, {"prompt": "", "completion": "a"}, "prompt is empty"),
    (demonstrations, {"prompt": "a", "completion": " \n"}, "completion is empty"),
    (demonstrations, {"prompt": 5, "completion": "a"}, 'prompt is 5; allowed: text, or a list of {"role": ..., "content": ...}'),
    (demonstrations, {"prompt": "a", "completion": [YES]}, "prompt and completion must be of one form"),
    (demonstrations, {"prompt": [USER], "completion": [YES, USER]}, 'completion ends with a turn of "user"'),
    (demonstrations, {"prompt": [USER, YES], "completion": [YES]}, "the prompt ends with an assistant turn"),
    (demonstrations, {"messages": [USER]}, "messages has no assistant turn, so there is nothing to learn"),
    (demonstrations, {"messages": [YES]}, "the conversation begins with an assistant turn"),
    (demonstrations, {"messages": []}, "messages is []; allowed"),
    (demonstrations, {"messages": "hello"}, "messages is \"hello\"; allowed"),
    (demonstrations, {"messages": [USER, "yes"]}, "turn 2 of messages is \"yes\"; allowed"),
    (demonstrations, {"messages": [USER, {"role": "assistant", "content": None}]}, "turn 2 of messages is {"),
    (demonstrations, {"messages": [USER, {"role": "assistant", "content": ""}]}, "turn 2 of messages is an empty answer"),
    (demonstrations, {"messages": [USER, {"role": "bot", "content": "a"}]}, "turn 2 of messages has role \"bot\"; allowed: system, user,"),
    (rankings, {"prompt": "a", "chosen": "b"}, "the columns are prompt, chosen; needed: prompt + chosen + rejected; or chosen + rejected;"),
    (rankings, {"prompt": "a", "chosen": "b", "rejected": [NO]}, "chosen and rejected must be of one form"),
    (rankings, {"chosen": "b", "rejected": "c"}, "without a prompt, chosen and rejected must be whole conversations"),
    (rankings, {"chosen": [YES], "rejected": [NO]}, "without a prompt, chosen and rejected must be whole conversations"),
    (rankings, {"chosen": [USER, YES], "rejected": [SYSTEM, NO]}, "chosen and rejected must be the same conversation up to"),
    (rankings, {"chosen": [USER, YES], "rejected": [USER]}, 'rejected ends with a turn of "user"'),
    (rankings, {"prompt": "P", "chosen": [USER, YES], "rejected": [USER, NO]}, NOT_HELD),
    (rankings, {"prompt": [SYSTEM], "chosen": [USER, YES], "rejected": [USER, NO]}, NOT_HELD),
    (rankings, {"prompt": "Q", "chosen": [YES], "rejected": [NO]}, "prompt, chosen and rejected must be of one form"),
    (rankings, {"prompt": "Q", "chosen": "yes", "rejected": ""}, "rejected is empty"),
    (rankings, {"prompt": "Q", "responses": ["a", "b"]}, "the columns are prompt, responses; needed: prompt + responses + ranks"),
    (rankings, {"prompt": "Q", "responses": "ab", "ranks": [1, 2]}, "responses is \"ab\"; allowed: a list of 2 to 9 texts"),
    (rankings, {"prompt": "Q", "responses": ["a"], "ranks": [1]}, "responses has 1 entries; allowed: 2 to 9"),
    (rankings, {"prompt": "Q", "responses": ["a"] * 10, "ranks": [1] * 10}, "responses has 10 entries; allowed: 2 to 9"),
    (rankings, {"prompt": "Q", "responses": ["a", ""], "ranks": [1, 2]}, "response 2 is \"\"; allowed: text that is not empty"),
    (rankings, {"prompt": "Q", "responses": ["a", None], "ranks": [1, 2]}, "response 2 is null; allowed"),
    (rankings, {"prompt": "Q", "responses": ["a", [YES]], "ranks": [1, 2]}, "response 2 is [{"),
    (rankings, {"prompt": [USER], "responses": ["a", [USER]], "ranks": [1, 2]}, "response 2 is [{"),
    (rankings, {"prompt": "Q", "responses": ["a", "b"], "ranks": [1]}, "there are 1 ranks for 2 responses; one each is needed"),
    (rankings, {"prompt": "Q", "responses": ["a", "b"], "ranks": [0, 1]}, "ranks is [0, 1]; allowed: a list of whole numbers, 1 is best"),
    (rankings, {"prompt": "Q", "responses": ["a", "b"], "ranks": [1.5, 1]}, "ranks is [1.5, 1]; allowed"),
    (rankings, {"prompt": "Q", "responses": ["a", "b"], "ranks": [True, 1]}, "ranks is [true, 1]; allowed"),
    (rankings, {"prompt": "Q", "chosen": "a", "rejected": "b", "weight": -1}, "weight is -1; allowed: a number at least 0"),
    (rankings, {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": -0.5}, "margin is -0.5; allowed: a number at least 0"),
    (rankings, {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": float("nan")}, "margin is NaN; allowed: a number at least 0"),
    (rankings, {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": float("inf")}, "margin is Infinity; allowed: a number at least 0"),
    (rankings, {"prompt": "Q", "chosen": "a", "rejected": "b", "weight": 10**400}, f"weight is 1{'0' * 199}...; allowed: a number"),
    (rankings, {"prompt": "Q", "chosen": "a", "rejected": "b", "weight": True}, "weight is true; allowed: a number at least 0"),
    (rankings, {"prompt": "Q", "chosen": "a", "rejected": "b", "weight": "2"}, "weight is \"2\"; allowed: a number at least 0"),
    (rankings, {"prompt": "Q", "chosen": "a", "rejected": "b", "preference": 1.5}, "preference is 1.5; allowed: a number from 0 to 1"),
    (rankings, {"prompt": "Q", "responses": ["a", "b", "c"], "ranks": [1, 2, 3], "preference": 0.5}, "preference is given with 3"),
    (prompts, {"question": "a"}, "the columns are question; needed: prompt; or messages"),
    (prompts, {"prompt": " "}, "prompt is empty"),
    (prompts, {"messages": [USER, YES]}, "the prompt ends with an assistant turn; it must end with the turn to be answered"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "row", "message"), BAD, ids=[message for _, _, message in BAD])
def test_a_bad_row_is_named_and_shown(read: Read, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(rows(row))
    assert str(caught.value).startswith(f"x.jsonl:1: {message}")
    assert f"; the row is {json.dumps(row, ensure_ascii=False)}"[:200] in str(caught.value)


def test_a_long_row_is_shown_in_part() -> None:
    with pytest.raises(DataError) as caught:
        prompts(rows({"text": "a b " * 1000}))
    assert len(str(caught.value)) < 300
    assert str(caught.value).endswith("...")


def test_an_id_that_is_taken_names_who_has_it() -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:3: the id 'a' is taken by x\.jsonl:1; ids must be unique, or left out"):
        prompts(rows({"id": "a", "prompt": "Q"}, {"id": "b", "prompt": "Q"}, {"id": "a", "prompt": "R"}))


def test_a_fingerprint_follows_the_values_and_their_order_and_nothing_else() -> None:
    a, b = {"prompt": "Q", "n": 1}, {"prompt": "R", "n": 2}
    assert fingerprint(rows(a, b)) == fingerprint([Row(dict(reversed(a.items())), "elsewhere"), Row(b, "elsewhere")])
    assert len({fingerprint(rows(a, b)), fingerprint(rows(b, a)), fingerprint(rows(a)), fingerprint(rows(a, {**b, "n": 3}))}) == 4
    # printf '{"n": 1, "prompt": "Q"}\n' | sha256sum
    assert fingerprint(rows(a)).startswith("7c99955c96342566")

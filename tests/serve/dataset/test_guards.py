"""Whose word counts, how much of it, and what looks as if nobody had thought about it."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit_serve.dataset.caps import capped, shares
from alignkit_serve.dataset.records import Evidence, Judgement, Made, made
from alignkit_serve.dataset.suspicion import bursts, copied, hasty
from alignkit_serve.dataset.trust import agreements, over_chance, votes, weights
from tests.serve.dataset.evidence import BEGIN, asked, converted, evidence, prefers, said

PROMPTS = {f"p{n}": {f"a{n}": f"good {n}", f"b{n}": f"bad {n}"} for n in range(24)}


def judged(by: str, *, first: int = 0, count: int = 24, wrong: int = 0, status: str = "active") -> list[Judgement]:
    """Of each prompt that its first answer is good (every second one that its second is bad), but for the first ``wrong`` ones."""
    return [
        said(
            first + n,
            "thumb",
            "down" if (n % 2 == 1) != (n < wrong) else "up",
            f"{'ab'[n % 2]}{n}",
            by=by,
            of=f"p{n}",
            status=status,
        )
        for n in range(count)
    ]


def trusted(*judgements: list[Judgement], probation: int = 20) -> dict[str, float]:
    given = [one for several in judgements for one in several]
    return weights(evidence(PROMPTS, given), given, probation=probation)


def test_a_new_annotator_counts_once_they_agreed_with_others_on_twenty_prompts() -> None:
    known = judged("known")
    assert trusted(known, judged("new", first=100, status="probation")) == {"known": 1.0, "new": 1.0}
    assert trusted(known, judged("new", first=100, count=19, status="probation")) == {"known": 1.0, "new": 0.0}
    assert trusted(known, judged("new", first=100, count=1, status="probation"), probation=0) == {"known": 1.0, "new": 1.0}


def test_agreement_must_be_more_than_luck() -> None:
    known = judged("known")
    # Chance is 0.5, so that of 24 more than 12 + 24 * 1.645 * sqrt(0.25 / 24) = 16.03 must agree.
    assert trusted(known, judged("new", first=100, wrong=7, status="probation"))["new"] == 1.0
    assert trusted(known, judged("new", first=100, wrong=8, status="probation"))["new"] == 0.0
    always_up = [said(100 + n, "thumb", "up", f"{'ab'[n % 2]}{n}", by="new", of=f"p{n}", status="probation") for n in range(24)]
    assert trusted(known, always_up)["new"] == 0.0


def test_one_who_says_yes_where_all_say_yes_has_shown_nothing() -> None:
    assert not over_chance([(f"p{n}", True, True) for n in range(100)], least=20)
    assert not over_chance([], least=0)


def test_many_pairs_of_one_prompt_are_one_prompt() -> None:
    assert not over_chance([("p", n % 2 == 0, n % 2 == 0) for n in range(100)], least=20)


def test_two_new_ones_can_vouch_for_each_other_and_a_blocked_one_for_nobody() -> None:
    new, other = judged("new", status="probation"), judged("other", first=100, status="probation")
    assert trusted(new, other) == {"new": 1.0, "other": 1.0}
    assert trusted(new, judged("other", first=100, status="blocked")) == {"new": 0.0, "other": 0.0}


def test_pairs_of_rankings_and_preferences_are_compared_too() -> None:
    given = [prefers(1, "a0", "b0", by="x", of="p0"), said(2, "ranking", [["a0"], ["b0"]], "inf-p0", by="y", of="p0")]
    found = agreements(votes(evidence(PROMPTS, given), given))
    assert {annotator: [mine == theirs for _, mine, theirs in one] for annotator, one in found.items()} == {"x": [True], "y": [True]}
    against = [given[0], said(2, "ranking", [["b0"], ["a0"]], "inf-p0", by="y", of="p0")]
    found = agreements(votes(evidence(PROMPTS, against), against))
    assert [mine == theirs for _, mine, theirs in found["x"]] == [False]


def test_where_the_others_are_divided_there_is_nothing_to_compare_with() -> None:
    given = [said(n, "thumb", value, "a0", by=by, of="p0") for n, by, value in ((1, "x", "up"), (2, "y", "up"), (3, "z", "down"))]
    assert set(agreements(votes(evidence(PROMPTS, given), given))) == {"z"}


def test_in_an_export_probation_is_a_reason() -> None:
    found = converted(evidence(PROMPTS, judged("new", status="probation")), "labels", probation=20)
    assert (found.rows, set(found.dropped.values())) == ((), {"probation"})


def a_row(number: int, *annotators: str) -> Made:
    return made({"n": number}, [said(number, "thumb", "up", "a", by=by) for by in annotators], [asked("q")], weight=1.0, origin="thumb")


def test_one_annotator_stands_for_no_more_than_their_share() -> None:
    # x has 8 of 11 rows and may have half of what is left: 3 of 6.
    rows = [a_row(n, "x") for n in range(8)] + [a_row(10 + n, "yz"[n % 2]) for n in range(3)]
    kept = capped(rows, 0.5, lambda row: row.annotators)
    assert Counter(by for row in kept for by in row.annotators) == {"x": 3, "y": 2, "z": 1}
    assert capped(rows, 1.0, lambda row: row.annotators) == rows


def test_where_there_are_too_few_for_so_small_a_share_nothing_is_cut() -> None:
    rows = [a_row(n, "x") for n in range(8)] + [a_row(10, "y")]
    assert capped(rows, 0.4, lambda row: row.annotators) == rows
    assert len(capped(rows, 0.5, lambda row: row.annotators)) == 2
    assert capped([], 0.05, lambda row: row.annotators) == []


def test_a_row_of_several_counts_in_parts() -> None:
    assert shares([a_row(1, "x", "y"), a_row(2, "x")], lambda row: row.annotators) == {"x": 1.5, "y": 0.5}


@given(
    st.lists(st.sets(st.sampled_from("vwxyz"), min_size=1, max_size=3), max_size=40), st.sampled_from([0.2, 0.25, 0.4, 0.5]), st.randoms()
)
@settings(max_examples=50, deadline=None)
def test_the_share_holds_and_what_is_cut_does_not_depend_on_the_order(whose: list[set[str]], share: float, order: object) -> None:
    rows = [a_row(n, *sorted(who)) for n, who in enumerate(whose)]
    kept = capped(rows, share, lambda row: row.annotators)
    mixed = capped(rows[::-1], share, lambda row: row.annotators)
    assert {row.digest for row in kept} == {row.digest for row in mixed}
    if len({by for who in whose for by in who}) * share >= 1:
        counts = shares(kept, lambda row: row.annotators)
        assert all(count <= share * len(kept) + 1e-6 for count in counts.values())


def test_the_manifest_says_how_much_was_cut_and_who_stands_for_what() -> None:
    prompts = {f"p{n}": {f"a{n}": "A"} for n in range(10)}
    given = [said(n, "thumb", "up", f"a{n}", by="x" if n < 8 else "y", of=f"p{n}") for n in range(10)]
    report = converted(evidence(prompts, given), "labels", annotator_share=0.5).report()
    assert (report["rows"], report["cut"]) == (4, {"annotator_share": 6, "key_share": 0})
    assert report["annotators"] == {"x": 0.5, "y": 0.5}
    assert report["feedback"] == {"kept": 4, "dropped": {"share": 6}}


def test_no_key_is_a_key_among_others() -> None:
    prompts = {f"p{n}": {f"a{n}": "A"} for n in range(10)}
    given = [said(n, "thumb", "up", f"a{n}", of=f"p{n}", api_key_id="k" if n < 8 else None) for n in range(10)]
    assert converted(evidence(prompts, given), "labels", key_share=0.5).report()["cut"] == {"annotator_share": 0, "key_share": 6}


def test_more_than_so_many_within_a_minute_are_a_burst() -> None:
    def at(*seconds: float) -> list[Judgement]:
        return [said(n, "thumb", "up", "a", occurred_at=BEGIN + timedelta(seconds=s)) for n, s in enumerate(seconds)]

    assert bursts(at(0, 10, 20, 59.9), 3) == {"fb-0000", "fb-0001", "fb-0002", "fb-0003"}
    assert bursts(at(0, 10, 20, 60), 3) == set()
    assert bursts(at(0, 100, 101, 102, 103, 500), 3) == {"fb-0001", "fb-0002", "fb-0003", "fb-0004"}
    others = [*at(0, 10), *(said(9 + n, "thumb", "up", "a", by="y", occurred_at=BEGIN) for n in range(2))]
    assert bursts(others, 3) == set()


@given(st.lists(st.integers(0, 200), max_size=30), st.integers(1, 5))
def test_bursts_are_what_counting_every_minute_finds(seconds: list[int], most: int) -> None:
    given = [said(n, "thumb", "up", "a", occurred_at=BEGIN + timedelta(seconds=s)) for n, s in enumerate(seconds)]
    minutes = [[one for one in given if begin <= (one.occurred_at - BEGIN).total_seconds() < begin + 60] for begin in range(201)]
    assert bursts(given, most) == {one.id for minute in minutes if len(minute) > most for one in minute}


def test_the_same_long_text_under_two_keys_is_copied() -> None:
    text = "The moon is made of a very old cheese."
    given = [
        said(1, "demonstration", text, "inf-q", api_key_id="k1"),
        said(2, "correction", text.upper() + " ", "a", api_key_id="k2"),
        said(3, "demonstration", "42", "inf-q", api_key_id="k1"),
        said(4, "demonstration", "42", "inf-q", api_key_id="k2"),
        said(5, "demonstration", text[:-1] + "!", "inf-q", api_key_id="k2"),
    ]
    assert copied(given) == {"fb-0001", "fb-0002"}
    assert copied(given[:1] * 2) == set()


def test_far_too_short_a_look_is_an_outlier_and_a_long_one_is_not() -> None:
    usual = [said(n, "ranking", [], "inf-q", dwell_ms=8000 + 200 * n) for n in range(20)]
    fast, slow = said(30, "ranking", [], "inf-q", dwell_ms=150), said(31, "ranking", [], "inf-q", dwell_ms=9_000_000)
    assert hasty([*usual, fast, slow]) == {"fb-0030"}
    assert hasty([*usual[:10], fast]) == set()
    assert hasty([said(n, "ranking", [], "inf-q", dwell_ms=5) for n in range(40)]) == set()


def test_what_is_suspect_is_left_out_and_named() -> None:
    prompts = {f"p{n}": {f"a{n}": "A"} for n in range(5)}
    given = [said(n, "thumb", "up", f"a{n}", of=f"p{n}", occurred_at=BEGIN) for n in range(5)]
    found = converted(evidence(prompts, given), "labels", burst=4)
    assert found.rows == ()
    assert found.report()["quarantine"] == {one.id: "burst" for one in given}
    assert len(converted(evidence(prompts, given), "labels", burst=5).rows) == 5


def test_nothing_makes_nothing() -> None:
    empty = Evidence((), {}, {})
    assert converted(empty, "rankings").rows == ()
    assert converted(empty, "labels").report()["annotators"] == {}
    assert weights(empty, (), probation=20) == pytest.approx({})

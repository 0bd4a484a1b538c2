"""The rules, one by one, on rows worked out by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.api import Row, SettingError
from alignkit.data.records import demonstrations, prompts, rankings
from alignkit_serve.dataset.filters import SHAPES, Filters, Shape
from alignkit_serve.dataset.parquet import record
from alignkit_serve.dataset.records import Answer, Evidence, Judgement
from alignkit_serve.dataset.split import in_holdout
from tests.serve.dataset.evidence import LOOSE, asked, converted, evidence, prefers, rows, said

ABC = {"q": {"a": "Answer A.", "b": "Answer B.", "c": "Answer C."}}


def labelled(*judgements: Judgement, **filters: Any) -> dict[str, bool]:
    return {row["completion"][0]["content"][-2]: row["label"] for row in rows(evidence(ABC, judgements), "labels", **filters)}


def why(shape: Shape, *judgements: Judgement, **filters: Any) -> dict[str, str]:
    return dict(converted(evidence(ABC, judgements), shape, **filters).dropped)


def test_a_thumb_is_a_label() -> None:
    assert labelled(said(1, "thumb", "up", "a"), said(2, "thumb", "down", "b")) == {"A": True, "B": False}


def test_a_metric_is_a_label_where_it_is_known_which_end_is_the_better_one() -> None:
    clear = {"metric": "bool", "better": "max"}
    toxic = {"metric": "bool", "better": "min"}
    long = {"metric": "bool"}
    stars = {"metric": "likert", "better": "max"}
    given = [
        said(1, "metric", True, "a", **clear),
        said(2, "metric", True, "b", **toxic),
        said(3, "metric", True, "c", **long),
        said(4, "metric", 5, "c", **stars),
    ]
    assert labelled(*given) == {"A": True, "B": False}
    assert why("labels", *given) == {"fb-0003": "metric", "fb-0004": "metric"}


def test_a_rating_is_a_label_when_it_is_far_enough_from_the_annotators_own_mean() -> None:
    # With five fours added, the mean of 7, 6, 2 is (15 + 20) / 8 = 4.375.
    given = [said(1, "rating", 7, "a"), said(2, "rating", 6, "b"), said(3, "rating", 2, "c")]
    assert labelled(*given) == {"A": True, "B": True, "C": False}
    assert labelled(*given, dead_band=2.0) == {"A": True, "C": False}
    assert why("labels", *given, dead_band=2.0) == {"fb-0002": "dead_band"}
    # The mean of a single 7 is (7 + 20) / 6 = 4.5, and 2.5 above it is not far enough.
    assert labelled(said(1, "rating", 7, "a"), dead_band=2.5) == {}


def test_both_bad_are_two_bad_labels_and_no_ranking() -> None:
    one = said(1, "preference", {"a": "a", "b": "b", "choice": "both_bad"}, "inf-q")
    assert labelled(one) == {"A": False, "B": False}
    assert why("rankings", one) == {"fb-0001": "both_bad"}
    assert why("labels", prefers(1, "a", "b")) == {}  # it is no judgement of one answer


def test_the_majority_by_weight_decides_and_a_tie_decides_nothing() -> None:
    up = [said(1, "thumb", "up", "a", by="x"), said(2, "thumb", "up", "a", by="y")]
    down = said(3, "thumb", "down", "a", by="z")
    (row,) = converted(evidence(ABC, [*up, down]), "labels").rows
    assert (row.values["label"], row.weight, row.feedback) == (True, pytest.approx(1 / 3), {"fb-0001", "fb-0002", "fb-0003"})
    heavy = said(3, "thumb", "down", "a", by="z", weight=3.0)
    (row,) = converted(evidence(ABC, [*up, heavy]), "labels").rows
    assert (row.values["label"], row.weight) == (False, pytest.approx(1 / 5))
    even = said(3, "thumb", "down", "a", by="z", weight=2.0)
    assert labelled(*up, even) == {}
    assert set(why("labels", *up, even).values()) == {"tie"}
    # 0.1 + 0.2 is not 0.3 in binary, and a tie all the same.
    tenths = [said(n, "thumb", v, "a", by=str(n), weight=w) for n, v, w in ((1, "up", 0.1), (2, "up", 0.2), (3, "down", 0.3))]
    assert labelled(*tenths) == {}


def test_an_annotator_has_one_vote_on_an_answer_and_it_is_their_last() -> None:
    given = [said(1, "thumb", "up", "a"), said(2, "thumb", "up", "a"), said(3, "thumb", "down", "a")]
    assert labelled(*given) == {"A": False}
    assert why("labels", *given) == {"fb-0001": "repeated", "fb-0002": "repeated"}


def test_the_same_text_given_twice_is_one_answer_however_its_letters_are_composed() -> None:
    twice = {"q": {"a": "Caf\u00e9.", "b": "Cafe\u0301."}}
    given = evidence(twice, [said(1, "thumb", "up", "a", by="x"), said(2, "thumb", "up", "b", by="y")])
    (row,) = converted(given, "labels").rows
    assert (row.feedback, row.values["completion"][0]["content"]) == ({"fb-0001", "fb-0002"}, "Caf\u00e9.")


def test_a_flag_is_a_no_and_what_is_flagged_is_never_good() -> None:
    flag = said(1, "flag", "harmful_advice", "a", by="x")
    assert labelled(flag) == {"A": False}
    assert labelled(flag, said(2, "thumb", "up", "a", by="x")) == {"A": False}
    outvoted = [flag, said(2, "thumb", "up", "a", by="y"), said(3, "thumb", "up", "a", by="z")]
    assert labelled(*outvoted) == {}
    assert set(why("labels", *outvoted).values()) == {"flagged"}
    # It holds even in an export that is made of thumbs alone.
    assert labelled(*outvoted, kinds=("thumb",)) == {}
    whole = said(1, "flag", "sexual", "inf-q", target_type="inference")
    assert labelled(whole) == {"A": False, "B": False, "C": False}


def test_what_is_said_of_several_answers_at_once_is_no_label() -> None:
    of_inference = said(1, "thumb", "up", "inf-q", target_type="inference")
    of_episode = said(2, "thumb", "up", "talk", target_type="episode", inference_id=None)
    assert why("labels", of_inference, of_episode) == {"fb-0001": "several_answers", "fb-0002": "episode"}
    alone = evidence({"q": {"a": "Only."}}, [of_inference])
    assert rows(alone, "labels")[0]["label"] is True


def test_a_preference_is_a_ranking_of_two_and_its_strength_the_margin() -> None:
    given = evidence(ABC, [prefers(1, "b", "a", strength=3, by="x")])
    assert rows(given, "rankings") == [
        {"responses": ["Answer B.", "Answer A."], "ranks": [1, 2], "labeler": "x", "margin": 3.0, "off_policy": False}
    ]
    assert rows(given, "comparisons") == [
        {
            "chosen": [{"role": "assistant", "content": "Answer B."}],
            "rejected": [{"role": "assistant", "content": "Answer A."}],
            "margin": 3.0,
        }
    ]


def test_a_tie_makes_no_pair() -> None:
    tie = said(1, "preference", {"a": "a", "b": "b", "choice": "tie"}, "inf-q")
    equal = said(2, "ranking", [["a", "b", "c"]], "inf-q")
    assert why("rankings", tie, equal) == {"fb-0001": "tie", "fb-0002": "tie"}


def test_a_ranking_keeps_its_ties_and_its_pairs_weigh_one_together() -> None:
    given = evidence(ABC, [said(1, "ranking", [["c"], ["a", "b"]], "inf-q", weight=0.5)])
    assert rows(given, "rankings")[0]["responses"] == ["Answer C.", "Answer A.", "Answer B."]
    assert rows(given, "rankings")[0]["ranks"] == [1, 2, 2]
    pairs = converted(given, "comparisons").rows
    assert sorted((p.values["chosen"][0]["content"], p.values["rejected"][0]["content"], p.weight) for p in pairs) == [
        ("Answer C.", "Answer A.", 0.25),
        ("Answer C.", "Answer B.", 0.25),
    ]


def test_a_correction_is_better_than_its_original_and_off_policy_and_a_demonstration() -> None:
    given = evidence(ABC, [said(1, "correction", "Corrected.", "a")])
    (row,) = rows(given, "rankings")
    assert (row["responses"], row["ranks"], row["off_policy"]) == (["Corrected.", "Answer A."], [1, 2], True)
    assert rows(given, "demonstrations") == [{"completion": [{"role": "assistant", "content": "Corrected."}]}]
    spaces = said(1, "correction", "Answer  A.\n", "a")
    assert why("rankings", spaces) == why("demonstrations", spaces) == {"fb-0001": "unchanged"}


def test_a_demonstration_is_learnt_and_what_two_wrote_alike_is_one_row() -> None:
    given = [said(1, "demonstration", "So.", "inf-q", by="x"), said(2, "demonstration", "So.", "inf-q", by="y")]
    (row,) = converted(evidence(ABC, given), "demonstrations").rows
    assert (row.feedback, row.weight) == ({"fb-0001", "fb-0002"}, 2.0)
    anew = said(3, "demonstration", "Thus.", "inf-q", by="x")
    assert len(rows(evidence(ABC, [*given, anew]), "demonstrations")) == 2
    assert why("demonstrations", *given, anew) == {"fb-0001": "repeated"}


def test_what_is_flagged_wins_over_nothing_and_the_others_stay_in_their_order() -> None:
    flag = said(9, "flag", "hallucination", "a", by="z")
    given = [said(1, "ranking", [["b"], ["a"], ["c"]], "inf-q"), flag]
    assert rows(evidence(ABC, given), "rankings")[0]["responses"] == ["Answer B.", "Answer C."]
    last = [said(1, "ranking", [["b"], ["c"], ["a"]], "inf-q"), flag]
    assert rows(evidence(ABC, last), "rankings")[0]["responses"] == ["Answer B.", "Answer C.", "Answer A."]
    assert why("rankings", prefers(1, "a", "b"), flag) == {"fb-0001": "flagged"}
    assert len(rows(evidence(ABC, [prefers(1, "b", "a"), flag]), "rankings")) == 1
    both = said(8, "flag", "sexual", "b", by="z")
    assert why("rankings", prefers(1, "b", "a"), flag, both) == {"fb-0001": "flagged"}
    copied = said(1, "demonstration", "Answer A.", "inf-q")
    assert why("demonstrations", copied, flag) == {"fb-0001": "flagged"}


def test_ratings_are_a_ranking_only_when_asked_for_and_far_apart() -> None:
    given = evidence(ABC, [said(1, "rating", 6, "a"), said(2, "rating", 4, "b"), said(3, "rating", 3, "c")])
    assert converted(given, "rankings").rows == ()
    found = converted(given, "rankings", rating_gap=2).rows
    assert sorted((row.values["responses"], row.weight, row.origin) for row in found) == [
        (["Answer A.", "Answer B."], 0.5, "rating_gap"),
        (["Answer A.", "Answer C."], 0.5, "rating_gap"),
    ]
    others = evidence(ABC, [said(1, "rating", 7, "a", by="x"), said(2, "rating", 1, "b", by="y")])
    assert converted(others, "rankings", rating_gap=2).rows == ()


def test_two_who_agree_are_one_comparison_and_two_who_do_not_are_a_dispute() -> None:
    agree = evidence(ABC, [prefers(1, "a", "b", by="x", strength=1), prefers(2, "a", "b", by="y", strength=2)])
    assert len(converted(agree, "rankings").rows) == 2
    (pair,) = converted(agree, "comparisons").rows
    assert (pair.weight, pair.values["margin"], pair.feedback) == (2.0, 1.5, {"fb-0001", "fb-0002"})
    differ = converted(evidence(ABC, [prefers(1, "a", "b", by="x"), prefers(2, "b", "a", by="y")]), "rankings")
    assert len(differ.rows) == 2
    (dispute,) = differ.report()["disputes"]
    assert {*dispute["feedback"], *dispute["against"]} == {"fb-0001", "fb-0002"}
    thumbs = converted(evidence(ABC, [said(1, "thumb", "up", "a", by="x"), said(2, "thumb", "down", "a", by="y")]), "labels")
    assert thumbs.report()["disputes"] == [{"feedback": ["fb-0001"], "against": ["fb-0002"]}]


def test_the_last_ranking_of_the_same_answers_counts() -> None:
    given = [prefers(1, "a", "b"), prefers(2, "b", "a")]
    assert rows(evidence(ABC, given), "rankings")[0]["responses"] == ["Answer B.", "Answer A."]
    assert why("rankings", *given) == {"fb-0001": "repeated"}


def test_prompts_each_once() -> None:
    twice = evidence(
        {**ABC, "r": {"d": "D"}, "s": {}}, [said(1, "thumb", "up", "a"), said(2, "thumb", "up", "b"), said(3, "thumb", "up", "d", of="r")]
    )
    found = converted(twice, "prompts").rows
    assert sorted(row.values["prompt"][0]["content"] for row in found) == ["q", "r"]
    assert {row.feedback for row in found} == {frozenset({"fb-0001", "fb-0002"}), frozenset({"fb-0003"})}
    everything = converted(twice, "prompts", of="all").rows
    assert sorted(row.values["prompt"][0]["content"] for row in everything) == ["q", "r", "s"]


@pytest.mark.parametrize(("role", "reason"), [("prompt", "other_form"), ("assistant", "no_question")])
def test_a_prompt_that_no_reader_takes_is_in_no_row(role: str, reason: str) -> None:
    answer = Answer("a", "text", "pol-1", asked("q", role))
    given = Evidence((said(1, "thumb", "up", "a"), said(2, "correction", "x", "a")), {"inf-q": answer.asked}, {"a": answer})
    assert dict(converted(given, "labels").dropped) == {"fb-0001": reason}
    assert dict(converted(given, "rankings").dropped) == dict(converted(given, "demonstrations").dropped) == {"fb-0002": reason}
    assert converted(given, "prompts", of="all").rows == ()


def test_text_that_was_continued_makes_rows_of_plain_text_and_none_among_conversations() -> None:
    film = "The film"
    answers = {id: Answer(id, text, "pol-1", asked(film, "prompt")) for id, text in {"a": " is fun.", "b": " is long."}.items()}
    given = Evidence(
        (prefers(1, "a", "b", of=film), said(2, "thumb", "up", "a", of=film), said(3, "correction", " is it.", "b", of=film)),
        {f"inf-{film}": asked(film, "prompt")},
        answers,
    )
    found = {shape: [row.values for row in converted(given, shape, form="text").rows] for shape in SHAPES}
    assert all(row["prompt"] == film for rows in found.values() for row in rows)
    assert {(row["chosen"], row["rejected"]) for row in found["comparisons"]} == {(" is fun.", " is long."), (" is it.", " is long.")}
    assert found["labels"] == [{"prompt": film, "completion": " is fun.", "label": True}]
    assert found["demonstrations"] == [{"prompt": film, "completion": " is it."}]
    assert found["prompts"] == [{"prompt": film}]
    assert converted(given, "comparisons").rows == ()


def test_an_answer_that_is_empty_or_may_not_be_used_is_in_no_row() -> None:
    thumb = said(1, "thumb", "up", "a")
    blank = evidence({"q": {"a": " ", "b": "B"}}, [thumb, prefers(2, "b", "a")])
    assert dict(converted(blank, "labels").dropped) == {"fb-0001": "empty_answer"}
    assert dict(converted(blank, "rankings").dropped) == {"fb-0002": "empty_answer"}
    gone = evidence({"q": {"b": "B"}}, [thumb, prefers(2, "b", "a"), said(3, "correction", "x", "a")])
    assert dict(converted(gone, "labels").dropped) == {"fb-0001": "unavailable"}
    assert dict(converted(gone, "rankings").dropped) == {"fb-0002": "unavailable", "fb-0003": "unavailable"}
    same = evidence({"q": {"a": "A", "b": "A", "c": "C"}}, [prefers(1, "a", "b"), said(2, "ranking", [["c"], ["a", "b"]], "inf-q")])
    assert dict(converted(same, "rankings").dropped) == {"fb-0001": "same_text"}
    assert rows(same, "rankings")[0]["responses"] == ["C", "A"]


def test_a_blocked_annotator_counts_for_nothing_and_neither_do_their_flags() -> None:
    given = [said(1, "thumb", "up", "a"), said(2, "flag", "sexual", "a", by="x", status="blocked")]
    assert labelled(*given) == {"A": True}
    assert why("labels", *given) == {"fb-0002": "blocked"}


def test_comments_are_no_kind_that_can_be_asked_for() -> None:
    with pytest.raises(SettingError, match='kinds: names "comment"; allowed: thumb'):
        Filters(kinds=("comment",))
    with pytest.raises(SettingError, match="rating_gap: is 1"):
        Filters(rating_gap=1)
    with pytest.raises(SettingError, match='since: is "yesterday"; allowed: a time such as 2026-05-01'):
        Filters(since="yesterday")


def test_filters_that_say_the_same_are_the_same() -> None:
    one = Filters(since="2026-05-01T02:00:00+02:00", kinds=("thumb", "flag", "thumb"))
    other = Filters(since="2026-05-01", kinds=("flag", "thumb"))
    assert one.as_json() == other.as_json()
    assert one.as_json()["since"] == "2026-05-01T00:00:00+00:00"


@st.composite
def situations(draw: st.DrawFn) -> Evidence:
    """Feedback of every kind on a few prompts with a few answers, some of them alike."""
    texts = st.sampled_from(["yes", "no", "maybe", "Cafe\u0301", "Caf\u00e9", " "])
    found = {f"p{p}": {f"p{p}-{i}": draw(texts) for i in range(draw(st.integers(1, 4)))} for p in range(draw(st.integers(1, 6)))}
    judgements = []
    for number in range(draw(st.integers(0, 25))):
        prompt = draw(st.sampled_from(sorted(found)))
        ids = sorted(found[prompt])
        kind = draw(st.sampled_from(["thumb", "rating", "flag", "correction", "demonstration", "preference", "ranking"]))
        about = {"by": draw(st.sampled_from("xyz")), "of": prompt, "weight": draw(st.sampled_from([0.5, 1.0]))}
        one = draw(st.sampled_from(ids))
        if kind in ("preference", "ranking"):
            if len(ids) < 2:
                continue
            mixed = draw(st.permutations(ids))
            cut = draw(st.integers(1, len(mixed) - 1))
            choice = {"a": mixed[0], "b": mixed[1], "choice": draw(st.sampled_from(["a", "b", "tie", "both_bad"]))}
            value: Any = choice if kind == "preference" else [mixed[:cut], mixed[cut:]]
            judgements.append(said(number, kind, value, f"inf-{prompt}", **about))
        elif kind == "demonstration":
            judgements.append(said(number, kind, draw(texts.filter(str.strip)), f"inf-{prompt}", **about))
        else:
            value = {"thumb": draw(st.sampled_from(["up", "down"])), "rating": draw(st.integers(1, 7)), "flag": "sexual"}.get(
                kind, "better"
            )
            judgements.append(said(number, kind, value, one, **about))
    return evidence(found, judgements)


@given(situations(), st.sampled_from(SHAPES), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_in_which_evidence_comes_changes_nothing(given: Evidence, shape: Shape, order: random.Random) -> None:
    filters = {"rating_gap": 2, "annotator_share": 0.4}
    first = converted(given, shape, **filters)
    judgements, asked_, answers = list(given.judgements), list(given.asked.items()), list(given.answers.items())
    for each in (judgements, asked_, answers):
        order.shuffle(each)
    mixed = Evidence(tuple(judgements), dict(asked_), dict(answers), given.candidates)
    assert converted(mixed, shape, **filters) == first


@given(situations(), st.sampled_from(SHAPES))
@settings(max_examples=50, deadline=None)
def test_every_judgement_is_in_a_row_or_has_a_reason_and_no_row_is_there_twice(given: Evidence, shape: Shape) -> None:
    found = converted(given, shape, rating_gap=2)
    kept = {id for row in found.rows for id in row.feedback}
    assert not kept & found.dropped.keys()
    used = {one.id for one in given.judgements if one.id in kept or one.id in found.dropped}
    of_shape = {"prompts": None, "demonstrations": {"demonstration", "correction"}}.get(shape)
    assert {one.id for one in given.judgements if of_shape is None or one.kind in of_shape} >= used
    assert len({row.digest for row in found.rows}) == len(found.rows)


@given(situations())
@settings(max_examples=50, deadline=None)
def test_the_pairs_of_rankings_weigh_what_the_rankings_do(given: Evidence) -> None:
    ranked, pairs = (converted(given, shape, rating_gap=3).rows for shape in ("rankings", "comparisons"))
    assert sum(row.weight for row in pairs) == pytest.approx(sum(row.weight for row in ranked))
    for row in pairs:
        assert row.values["chosen"] != row.values["rejected"]


@given(situations())
@settings(max_examples=50, deadline=None)
def test_what_is_flagged_never_wins(given: Evidence) -> None:
    flagged = {given.answers[one.target_id].key for one in given.judgements if one.kind == "flag"}
    texts = {(answer.asked.messages[0]["content"], answer.text) for answer in given.answers.values() if answer.key in flagged}
    for row in converted(given, "comparisons", rating_gap=2).rows:
        assert (row.values["prompt"][0]["content"], row.values["chosen"][0]["content"]) not in texts
    for row in converted(given, "labels").rows:
        answer = (row.values["prompt"][0]["content"], row.values["completion"][0]["content"])
        assert not (row.values["label"] and answer in texts)


@given(situations())
@settings(max_examples=40, deadline=None)
def test_the_readers_take_every_row(given: Evidence) -> None:
    readers: dict[Shape, Any] = {"rankings": rankings, "comparisons": rankings, "demonstrations": demonstrations, "prompts": prompts}
    for shape, read in readers.items():
        found = converted(given, shape, rating_gap=2).rows
        read_rows = read([Row(record(row), str(number)) for number, row in enumerate(found)])
        assert len(read_rows) == len(found)
        if shape in ("rankings", "comparisons"):
            assert [row.weight for row in found] == [one.weight for one in read_rows]


@given(st.binary(min_size=32, max_size=32), st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=40))
def test_a_prompt_is_of_one_split_for_ever(salt: bytes, names: list[str]) -> None:
    given = evidence(
        {name: {f"{name}-1": "x"} for name in names}, [said(n, "thumb", "up", f"{name}-1", of=name) for n, name in enumerate(names)]
    )
    train, holdout, both = (
        {row.prompt_sha256 for row in converted(given, "labels", split, salt).rows} for split in ("train", "holdout", "all")
    )
    assert not train & holdout
    assert train | holdout == both
    assert all(in_holdout(salt, prompt) for prompt in holdout)


def test_a_tenth_is_held_out() -> None:
    held = sum(in_holdout(b"salt", f"{n:064x}") for n in range(10_000))
    assert 900 < held < 1100


def test_loose_filters_are_loose() -> None:
    assert set(LOOSE) < set(Filters.names())

"""Answers to one prompt from the best to the worst, as one annotator sees them; and the pairs that follow from it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any

from alignkit_serve.dataset.records import (
    Asked,
    Dispute,
    Evidence,
    Judgement,
    Made,
    Outcome,
    answer_key,
    as_answer,
    as_prompt,
    digest,
    made,
    merged,
    normal,
    unusable,
)
from alignkit_serve.dataset.trust import tiers


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A text in a ranking. ``policy_id`` None: a person wrote it."""

    text: str
    rank: int
    key: str
    policy_id: str | None


@dataclass(frozen=True, slots=True)
class _Ranked:
    """What somebody says of several texts. ``target``: what they have one say on."""

    judgements: tuple[Judgement, ...]
    asked: tuple[Asked, ...]
    candidates: tuple[_Candidate, ...]
    target: tuple[Any, ...]
    origin: str
    share: float = 1.0


def rankings(
    evidence: Evidence, judgements: Sequence[Judgement], weights: Mapping[str, float], flagged: frozenset[str], *, rating_gap: int
) -> Outcome:
    """Rows of ``prompt``, ``responses`` and ``ranks``, one of each annotator. ``judgements``: those that count, as they were given.

    ``flagged``: keys of answers that may win over none: one that would is taken out, and the others stay in their order.
    ``rating_gap``: two ratings so far apart are a ranking too; 0: they are not.
    """
    dropped: dict[str, str] = {}
    last: dict[tuple[Any, ...], _Ranked] = {}
    for one in judgements:
        if one.kind == "rating":
            continue
        found = _ranked(evidence, one, flagged)
        if isinstance(found, str):
            dropped[one.id] = found
            continue
        if before := last.get(found.target):
            dropped[before.judgements[0].id] = "repeated"
        last[found.target] = found
    kept = [*last.values(), *(_by_ratings(evidence, judgements, flagged, rating_gap) if rating_gap else ())]
    return Outcome(tuple(_row(one, weights) for one in kept), dropped, tuple(_disputes(kept)))


def strict(row: Made) -> list[tuple[str, str]]:
    """Of a ranking, each better and worse response."""
    ranked = list(zip(row.values["ranks"], row.values["responses"], strict=True))
    return [(better, worse) for (first, better), (second, worse) in combinations(ranked, 2) if first < second]


def comparisons(ranked: Iterable[Made]) -> list[Made]:
    """Every strict pair of rankings as ``prompt``, ``chosen`` and ``rejected``; together a ranking's pairs weigh what the ranking does.

    What several annotators say alike is one row, with their weights added up and the mean of their margins.
    """
    same: defaultdict[str, list[Made]] = defaultdict(list)
    for row in ranked:
        pairs = strict(row)
        for chosen, rejected in pairs:
            prompt = row.values["prompt"]
            values = {"prompt": prompt, "chosen": as_answer(prompt, chosen), "rejected": as_answer(prompt, rejected)}
            pair = replace(row, values={**values, "margin": row.values["margin"]}, digest=digest(values), weight=row.weight / len(pairs))
            same[pair.digest].append(pair)
    return [_averaged(pairs) for pairs in same.values()]


def _averaged(pairs: Sequence[Made]) -> Made:
    row = merged(pairs)
    pairs = sorted(pairs, key=lambda pair: sorted(pair.feedback))
    margin = math.fsum(pair.weight * pair.values["margin"] for pair in pairs) / row.weight
    return replace(row, values={**row.values, "margin": margin})


def _ranked(evidence: Evidence, one: Judgement, flagged: frozenset[str]) -> _Ranked | str:
    """A ranking of at least two texts, or why there is none."""
    if one.kind == "correction":
        return _corrected(evidence, one, flagged)
    if one.kind == "preference" and one.value["choice"] == "both_bad":
        return "both_bad"
    found = [(rank, answer) for rank, tier in enumerate(tiers(one)) for id in tier if (answer := evidence.answers.get(id))]
    if len(found) < 2:
        return "unavailable"
    if reason := unusable(found[0][1].asked):
        return reason
    if len({answer.asked.prompt_sha256 for _, answer in found}) > 1:
        return "several_prompts"
    candidates = [_Candidate(answer.text, rank, answer.key, answer.policy_id) for rank, answer in found if answer.text.strip()]
    if len(candidates) < 2:
        return "empty_answer"
    usable = _unflagged(_distinct(candidates), flagged)
    if isinstance(usable, str):
        return usable
    target = (one.annotator_id, frozenset(each.key for each in usable))
    return _Ranked((one,), tuple(answer.asked for _, answer in found), usable, target, one.kind)


def _corrected(evidence: Evidence, one: Judgement, flagged: frozenset[str]) -> _Ranked | str:
    original = evidence.answers.get(one.target_id)
    if original is None:
        return "unavailable"
    if reason := unusable(original.asked) or (None if original.text.strip() else "empty_answer"):
        return reason
    if normal(one.value).split() == normal(original.text).split():
        return "unchanged"
    correction = _Candidate(one.value, 0, answer_key(original.asked.prompt_sha256, one.value), None)
    usable = _unflagged([correction, _Candidate(original.text, 1, original.key, original.policy_id)], flagged)
    if isinstance(usable, str):
        return usable
    return _Ranked((one,), (original.asked,), usable, (one.annotator_id, "correction", original.key), "correction")


def _by_ratings(evidence: Evidence, judgements: Iterable[Judgement], flagged: frozenset[str], gap: int) -> Iterator[_Ranked]:
    """Of each annotator and prompt, every two answers that they rated so far apart; together these pairs weigh as one ranking."""
    rated: defaultdict[tuple[str, str], dict[str, Judgement]] = defaultdict(dict)
    for one in judgements:
        answer = evidence.sole(one) if one.kind == "rating" else None
        if answer and answer.text.strip() and not unusable(answer.asked):
            rated[one.annotator_id, answer.asked.prompt_sha256][answer.key] = one
    for (annotator, _), given in rated.items():
        ordered = sorted(given.items(), key=lambda item: (-item[1].value, item[0]))
        pairs = [
            (better, worse)
            for better, worse in combinations(ordered, 2)
            if better[1].value - worse[1].value >= gap and better[0] not in flagged
        ]
        for pair in pairs:
            answers = [evidence.judged(one)[0] for _, one in pair]
            yield _Ranked(
                judgements=tuple(one for _, one in pair),
                asked=tuple(answer.asked for answer in answers),
                candidates=tuple(_Candidate(each.text, rank, each.key, each.policy_id) for rank, each in enumerate(answers)),
                target=(annotator, "rating", *(key for key, _ in pair)),
                origin="rating_gap",
                share=1 / len(pairs),
            )


def _distinct(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Each text once; one that stands in two places at once stands in none."""
    ranks: defaultdict[str, set[int]] = defaultdict(set)
    for each in candidates:
        ranks[each.key].add(each.rank)
    return list({each.key: each for each in candidates if len(ranks[each.key]) == 1}.values())


def _unflagged(candidates: Sequence[_Candidate], flagged: frozenset[str]) -> tuple[_Candidate, ...] | str:
    """Without those that are flagged and better than another; a reason where nothing is left to compare."""
    if len(candidates) < 2:
        return "same_text"
    worst = max(each.rank for each in candidates)
    kept = tuple(each for each in candidates if each.key not in flagged or each.rank == worst)
    if len(kept) < 2:
        return "flagged"
    return kept if len({each.rank for each in kept}) > 1 else "tie"


def _row(ranked: _Ranked, weights: Mapping[str, float]) -> Made:
    """Responses in an order that follows from the row alone; ranks without gaps."""
    ordered = sorted(ranked.candidates, key=lambda each: (each.rank, normal(each.text)))
    ranks = {rank: number for number, (rank, _) in enumerate(groupby(ordered, key=lambda each: each.rank), start=1)}
    said = ranked.judgements[0]
    return made(
        {
            "prompt": as_prompt(ranked.asked[0]),
            "responses": [each.text for each in ordered],
            "ranks": [ranks[each.rank] for each in ordered],
            "labeler": said.annotator_id,
            "margin": float(said.value.get("strength", 0)) if said.kind == "preference" else 0.0,
            "off_policy": any(each.policy_id is None for each in ordered),
        },
        ranked.judgements,
        ranked.asked,
        weight=weights[said.annotator_id] * ranked.share,
        origin=ranked.origin,
        policies=[each.policy_id for each in ordered if each.policy_id is not None],
    )


def _disputes(ranked: Iterable[_Ranked]) -> Iterator[Dispute]:
    """Two answers of which one annotator says that one is better, and another that the other is."""
    by_prompt: defaultdict[str, list[_Ranked]] = defaultdict(list)
    for one in ranked:
        by_prompt[one.asked[0].prompt_sha256].append(one)
    for prompt, theirs in by_prompt.items():
        if len({one.judgements[0].annotator_id for one in theirs}) < 2:
            continue
        said: defaultdict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
        for one in theirs:
            for first, second in combinations(one.candidates, 2):
                if first.rank != second.rank:
                    better, worse = (first, second) if first.rank < second.rank else (second, first)
                    said[better.key, worse.key].update((each.annotator_id, each.id) for each in one.judgements)
        for pair, these in said.items():
            those = said.get(pair[::-1], set())
            if pair < pair[::-1] and those and len({annotator for annotator, _ in these | those}) > 1:
                yield Dispute(prompt, tuple(sorted(id for _, id in these)), tuple(sorted(id for _, id in those)))

"""One answer, good or bad: what most annotators say, each with one vote an answer. A flagged answer is never good."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from alignkit_serve.dataset.records import Answer, Dispute, Evidence, Judgement, Made, Outcome, as_answer, as_prompt, made, unusable
from alignkit_serve.dataset.trust import verdict

MIDDLE = 4.0
"""Of the scale from 1 to 7."""

PRIOR = 5
"""So many ratings of the middle are added to an annotator's own before their mean is taken: one 7 says little of how they rate."""


@dataclass(frozen=True, slots=True)
class _Ballot:
    judgement: Judgement
    answer: Answer
    good: bool


def labels(
    evidence: Evidence, judgements: Sequence[Judgement], weights: Mapping[str, float], vetoed: frozenset[str], *, dead_band: float
) -> Outcome:
    """Rows of ``prompt``, ``completion`` and ``label``. ``judgements``: those that count, in the order in which they were given.

    ``vetoed``: keys of answers that somebody who counts has flagged, even where flags are not among the judgements.
    A row's weight is how far the annotators agree: the share of the majority, less that of the minority.
    """
    dropped: dict[str, str] = {}
    ballots: defaultdict[str, dict[str, _Ballot]] = defaultdict(dict)
    flagged: defaultdict[str, dict[str, _Ballot]] = defaultdict(dict)
    means = rating_means(judgements)
    for one in judgements:
        found = _ballots(evidence, one, means, dead_band)
        if isinstance(found, str):
            dropped[one.id] = found
            continue
        for ballot in found:
            box = flagged if one.kind == "flag" else ballots
            if before := box[ballot.answer.key].get(one.annotator_id):
                dropped[before.judgement.id] = "repeated"
            box[ballot.answer.key][one.annotator_id] = ballot
    rows, disputes = [], []
    for key in {**ballots, **flagged}:
        # A flag is a no, whatever the same annotator says besides.
        counted = [*({**ballots[key], **flagged[key]}.values())]
        yes, no = ([one for one in counted if one.good is side] for side in (True, False))
        if yes and no:
            disputes.append(Dispute(yes[0].answer.asked.prompt_sha256, _ids(yes), _ids(no)))
        row = _row(yes, no, weights, vetoed=key in vetoed)
        if isinstance(row, str):
            dropped |= {one.judgement.id: row for one in counted}
        else:
            rows.append(row)
    return Outcome(tuple(rows), dropped, tuple(disputes))


def rating_means(judgements: Iterable[Judgement]) -> dict[str, float]:
    """What each annotator gives on average; of one who rated little it is near the scale's middle."""
    given: defaultdict[str, list[int]] = defaultdict(list)
    for one in judgements:
        if one.kind == "rating":
            given[one.annotator_id].append(one.value)
    return {annotator: (sum(values) + PRIOR * MIDDLE) / (len(values) + PRIOR) for annotator, values in given.items()}


def _ballots(evidence: Evidence, one: Judgement, means: Mapping[str, float], dead_band: float) -> list[_Ballot] | str:
    """What a judgement says of which answers, or why it says nothing. Of preferences, only ``both_bad`` comes here."""
    if one.kind == "preference":
        answers = tuple(evidence.answers[id] for id in (one.value["a"], one.value["b"]) if id in evidence.answers)
    elif one.target_type == "episode":
        return "episode"
    elif one.kind != "flag" and len(evidence.ids(one)) > 1:
        return "several_answers"
    else:
        answers = evidence.judged(one)
    if not answers:
        return "unavailable"
    if reason := unusable(answers[0].asked) or ("empty_answer" if not all(answer.text.strip() for answer in answers) else None):
        return reason
    good = _says(one, means, dead_band)
    return good if isinstance(good, str) else [_Ballot(one, answer, good) for answer in answers]


def _says(one: Judgement, means: Mapping[str, float], dead_band: float) -> bool | str:
    if one.kind in ("preference", "flag"):
        return False
    if one.kind == "rating":
        above = one.value - means[one.annotator_id]
        return "dead_band" if abs(above) <= dead_band else bool(above > 0)
    good = verdict(one)
    return "metric" if good is None else good


def _row(yes: Sequence[_Ballot], no: Sequence[_Ballot], weights: Mapping[str, float], *, vetoed: bool) -> Made | str:
    for_it, against = (math.fsum(weights[one.judgement.annotator_id] for one in side) for side in (yes, no))
    if math.isclose(for_it, against):
        return "tie"
    label = for_it > against
    if label and vetoed:
        return "flagged"
    counted = sorted((*yes, *no), key=lambda one: one.judgement.id)
    answer = min((one.answer for one in counted), key=lambda answer: answer.id)
    prompt = as_prompt(answer.asked)
    return made(
        {"prompt": prompt, "completion": as_answer(prompt, answer.text), "label": label},
        [one.judgement for one in counted],
        [one.answer.asked for one in counted],
        weight=abs(for_it - against) / (for_it + against),
        origin=",".join(sorted({one.judgement.kind for one in counted})),
        policies=[one.answer.policy_id for one in counted],
    )


def _ids(side: Sequence[_Ballot]) -> tuple[str, ...]:
    return tuple(sorted(one.judgement.id for one in side))

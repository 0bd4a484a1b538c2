"""How far an annotator is trusted: as the store says, and a new one once they agree with others more than luck would have it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from alignkit_serve.dataset.records import Evidence, Judgement

ONCE_IN_TWENTY = 1.645
"""Standard errors that luck alone exceeds once in twenty times."""


@dataclass(frozen=True, slots=True)
class Vote:
    """A yes or a no of an annotator to a ``question``: whether an answer is good, or whether it is better than another."""

    question: tuple[str, ...]
    prompt_sha256: str
    annotator_id: str
    yes: bool


def weights(evidence: Evidence, judgements: Sequence[Judgement], *, probation: int) -> dict[str, float]:
    """What each annotator's word counts. ``judgements``: those that are not suspect, in the order in which they were given.

    Blocked: nothing. In probation: nothing, until ``probation`` prompts were judged by others too, with agreement over chance.
    """
    annotators = {one.annotator_id: one for one in judgements}
    tested = probation and any(one.status == "probation" for one in annotators.values())
    compared = agreements(votes(evidence, (one for one in judgements if one.status != "blocked"))) if tested else {}
    found = {}
    for id, one in annotators.items():
        trusted = one.status == "active" or (
            one.status == "probation" and (not probation or over_chance(compared.get(id, ()), least=probation))
        )
        found[id] = one.weight if trusted else 0.0
    return found


def votes(evidence: Evidence, judgements: Iterable[Judgement]) -> Iterator[Vote]:
    """The yes and no of thumbs, of metrics that are either, and of the pairs of preferences and rankings."""
    for one in judgements:
        good = verdict(one)
        if good is not None:
            if answer := evidence.sole(one):
                yield Vote(("good", answer.key), answer.asked.prompt_sha256, one.annotator_id, good)
            continue
        for better, worse in strict_pairs(one):
            if (first := evidence.answers.get(better)) and (second := evidence.answers.get(worse)) and first.key != second.key:
                low, high = sorted((first.key, second.key))
                yield Vote(("better", low, high), first.asked.prompt_sha256, one.annotator_id, low == first.key)


def verdict(judgement: Judgement) -> bool | None:
    """What a thumb, or a metric that is yes or no and of which one knows which is better, says of an answer; None: another judgement."""
    if judgement.kind == "thumb":
        return bool(judgement.value == "up")
    if judgement.kind == "metric" and judgement.metric == "bool" and judgement.better is not None:
        return bool(judgement.value) == (judgement.better == "max")
    return None


def tiers(judgement: Judgement) -> list[list[str]]:
    """The completions that a preference or a ranking compares, from the best to the worst; none where it compares nothing."""
    if judgement.kind == "ranking":
        return [list(tier) for tier in judgement.value]
    if judgement.kind == "preference" and judgement.value["choice"] in ("a", "b", "tie"):
        a, b = judgement.value["a"], judgement.value["b"]
        return {"a": [[a], [b]], "b": [[b], [a]], "tie": [[a, b]]}[judgement.value["choice"]]
    return []


def strict_pairs(judgement: Judgement) -> Iterator[tuple[str, str]]:
    """Which completion is better than which."""
    for better, worse in combinations(tiers(judgement), 2):
        yield from ((first, second) for first in better for second in worse)


def agreements(given: Iterable[Vote]) -> dict[str, list[tuple[str, bool, bool]]]:
    """For each annotator the questions that others answered too: the prompt, their own answer, and that of most of the others.

    An annotator's last answer to a question is their answer; where the others are divided equally, there is none to compare with.
    """
    answered: defaultdict[tuple[str, ...], dict[str, Vote]] = defaultdict(dict)
    for vote in given:
        answered[vote.question][vote.annotator_id] = vote
    found: defaultdict[str, list[tuple[str, bool, bool]]] = defaultdict(list)
    for theirs in answered.values():
        yes = sum(vote.yes for vote in theirs.values())
        for vote in theirs.values():
            others_yes, others = yes - vote.yes, len(theirs) - 1
            if 2 * others_yes != others:
                found[vote.annotator_id].append((vote.prompt_sha256, vote.yes, 2 * others_yes > others))
    return dict(found)


def over_chance(compared: Sequence[tuple[str, bool, bool]], *, least: int) -> bool:
    """Whether one agrees with the others on at least ``least`` prompts more than luck would have it once in twenty times.

    Chance is what two would agree who say yes as often as these do, and know nothing (Cohen 1960): who always says yes learns nothing.
    """
    by_prompt: defaultdict[str, list[bool]] = defaultdict(list)
    for prompt, mine, theirs in compared:
        by_prompt[prompt].append(mine == theirs)
    count = len(by_prompt)
    if count < max(least, 1):
        return False
    agreement = math.fsum(sum(same) / len(same) for same in by_prompt.values()) / count
    chance = _chance(compared)
    return agreement - chance > ONCE_IN_TWENTY * math.sqrt(chance * (1 - chance) / count)


def _chance(compared: Sequence[tuple[str, bool, bool]]) -> float:
    mine = sum(yes for _, yes, _ in compared) / len(compared)
    theirs = sum(yes for _, _, yes in compared) / len(compared)
    return mine * theirs + (1 - mine) * (1 - theirs)


def counted(weights: Mapping[str, float], judgement: Judgement) -> bool:
    """Whether a judgement's annotator counts for anything."""
    return weights[judgement.annotator_id] > 0

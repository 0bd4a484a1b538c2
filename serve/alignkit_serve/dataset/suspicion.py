"""What looks as if no person had thought about it: it is left out and named, for people to look at, and nothing is deleted."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

from alignkit_serve.dataset.records import Judgement, normal

LONG_ENOUGH = 32
"""Characters from which on two people who write the same did not think of it independently."""

ENOUGH_DWELLS = 20
"""Judgements of a kind from which on it can be told how long one usually takes."""

FAR_OUT = 3.5
"""Median absolute deviations beyond which a value is an outlier (Iglewicz and Hoaglin 1993)."""


def suspects(judgements: Sequence[Judgement], *, burst: int) -> dict[str, str]:
    """The ids of what is suspect, each with why; with several reasons the first of them."""
    return {
        **dict.fromkeys(hasty(judgements), "dwell"),
        **(dict.fromkeys(bursts(judgements, burst), "burst") if burst else {}),
        **dict.fromkeys(copied(judgements), "copied"),
    }


def copied(judgements: Iterable[Judgement]) -> set[str]:
    """Corrections and demonstrations whose text, but for case and spaces, came with more than one key."""
    found: defaultdict[str, list[Judgement]] = defaultdict(list)
    for one in judgements:
        if one.kind in ("correction", "demonstration"):
            text = " ".join(normal(one.value).casefold().split())
            if len(text) >= LONG_ENOUGH:
                found[text].append(one)
    return {one.id for same in found.values() if len({each.api_key_id for each in same}) > 1 for one in same}


def bursts(judgements: Iterable[Judgement], most: int) -> set[str]:
    """Judgements in a minute in which one annotator gave more than ``most``."""
    by_annotator: defaultdict[str, list[Judgement]] = defaultdict(list)
    for one in judgements:
        by_annotator[one.annotator_id].append(one)
    found: set[str] = set()
    for theirs in by_annotator.values():
        theirs.sort(key=lambda one: (one.occurred_at, one.id))
        begin = marked = 0
        for end, one in enumerate(theirs, start=1):
            while one.occurred_at - theirs[begin].occurred_at >= timedelta(minutes=1):
                begin += 1
            if end - begin > most:
                found.update(each.id for each in theirs[max(begin, marked) : end])
                marked = end
    return found


def hasty(judgements: Iterable[Judgement]) -> set[str]:
    """Judgements of which one knows how long they took, and which took far less time than others of their kind."""
    timed: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for one in judgements:
        if one.dwell_ms is not None:
            timed[one.kind][one.id] = math.log(max(one.dwell_ms, 1))
    return {id for taken in timed.values() if len(taken) >= ENOUGH_DWELLS for id in _far_below(taken)}


def _far_below(values: Mapping[str, float]) -> set[str]:
    middle = statistics.median(values.values())
    spread = statistics.median(abs(value - middle) for value in values.values())
    # 0.6745 makes the spread comparable with a normal distribution's standard deviation.
    return {id for id, value in values.items() if 0.6745 * (middle - value) > FAR_OUT * spread > 0}

"""What people wrote, to be learnt as it is, and the prompts by themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignkit_serve.dataset.records import (
    Asked,
    Evidence,
    Judgement,
    Made,
    Outcome,
    answer_key,
    as_answer,
    as_prompt,
    made,
    merged,
    normal,
    unusable,
)


def demonstrations(evidence: Evidence, judgements: Sequence[Judgement], weights: Mapping[str, float], flagged: frozenset[str]) -> Outcome:
    """Rows of ``prompt`` and ``completion``: demonstrations, and what answers were corrected to. One of each annotator and target."""
    dropped: dict[str, str] = {}
    last: dict[tuple[Any, ...], tuple[Judgement, Asked]] = {}
    for one in judgements:
        found = _prompt(evidence, one, flagged)
        if isinstance(found, str):
            dropped[one.id] = found
            continue
        target = (one.annotator_id, one.kind, one.target_id)
        if before := last.get(target):
            dropped[before[0].id] = "repeated"
        last[target] = one, found
    rows = [
        made(
            {"prompt": as_prompt(asked), "completion": as_answer(as_prompt(asked), one.value)},
            [one],
            [asked],
            weight=weights[one.annotator_id],
            origin=one.kind,
        )
        for one, asked in last.values()
    ]
    return Outcome(tuple(_once(rows)), dropped)


def prompts(evidence: Evidence, judgements: Iterable[Judgement], *, judged: bool) -> Outcome:
    """Rows of ``prompt``, each once. ``judged``: those alone of whose answers something was said."""
    dropped: dict[str, str] = {}
    said: defaultdict[str, list[Judgement]] = defaultdict(list)
    for one in judgements:
        found = evidence.prompt_of(one)
        reason = "unavailable" if found is None else unusable(found)
        if found is None or reason:
            dropped[one.id] = reason or "unavailable"
        else:
            said[found.prompt_sha256].append(one)
    asked: defaultdict[str, list[Asked]] = defaultdict(list)
    for each in evidence.asked.values():
        if not unusable(each) and (not judged or each.prompt_sha256 in said):
            asked[each.prompt_sha256].append(each)
    rows = [
        replace(
            made(
                {"prompt": as_prompt(found[0])},
                said[prompt],
                found,
                weight=1.0,
                origin="prompt",
                policies=[one.policy_id for one in found],
            ),
            # Nobody's opinion is in a prompt, and so nobody has a share of them.
            annotators=frozenset(),
            keys=frozenset(),
        )
        for prompt, found in asked.items()
    ]
    return Outcome(tuple(_once(rows)), dropped)


def _prompt(evidence: Evidence, one: Judgement, flagged: frozenset[str]) -> Asked | str:
    """What a text answers, or why it is not taken."""
    if one.kind == "correction":
        original = evidence.answers.get(one.target_id)
        if original is not None and normal(one.value).split() == normal(original.text).split():
            return "unchanged"
        asked = original.asked if original else None
    else:
        asked = evidence.prompt_of(one)
    if asked is None:
        return "unavailable"
    if answer_key(asked.prompt_sha256, one.value) in flagged:
        return "flagged"
    return unusable(asked) or asked


def _once(rows: Iterable[Made]) -> list[Made]:
    """What several say alike is one row, with their weights added up."""
    same: defaultdict[str, list[Made]] = defaultdict(list)
    for row in rows:
        same[row.digest].append(row)
    return [merged(each) for each in same.values()]

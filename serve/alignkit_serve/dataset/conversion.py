"""From evidence to the rows of an export: what counts, what it makes, what is cut, and why each judgement that is in no row is in none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit_serve.dataset import labels, rankings, texts, trust
from alignkit_serve.dataset.caps import capped, shares
from alignkit_serve.dataset.filters import JUDGING, Filters, Shape, Split
from alignkit_serve.dataset.records import Dispute, Evidence, Judgement, Made, Outcome
from alignkit_serve.dataset.split import belongs
from alignkit_serve.dataset.suspicion import suspects

MAKES: Mapping[Shape, tuple[str, ...]] = {
    "demonstrations": ("demonstration", "correction"),
    "rankings": ("preference", "ranking", "correction"),
    "comparisons": ("preference", "ranking", "correction"),
    "labels": ("thumb", "rating", "metric", "preference", "flag"),
    "prompts": JUDGING,
}
"""The kinds of feedback that the rows of a shape are made of."""


@dataclass(frozen=True, slots=True)
class Converted:
    """``rows``: in their order. ``dropped``: judgements that are in none of them, by id, each with why. ``cut``: rows beyond a share."""

    rows: tuple[Made, ...]
    dropped: Mapping[str, str]
    cut: Mapping[str, int]
    disputes: tuple[Dispute, ...]

    def report(self) -> dict[str, Any]:
        """For the manifest."""
        kept = {id for row in self.rows for id in row.feedback}
        annotators = shares(self.rows, lambda row: row.annotators)
        return {
            "rows": len(self.rows),
            "feedback": {"kept": len(kept), "dropped": dict(sorted(Counter(self.dropped.values()).items()))},
            "cut": dict(self.cut),
            "quarantine": {id: reason for id, reason in sorted(self.dropped.items()) if reason in ("burst", "copied", "dwell")},
            "disputes": [{"feedback": [*one.one_side], "against": [*one.other_side]} for one in self.disputes],
            "origins": dict(sorted(Counter(row.origin for row in self.rows).items())),
            "policies": dict(sorted(Counter(id for row in self.rows for id in row.policies).items())),
            "annotators": {id: round(count / len(self.rows), 6) for id, count in sorted(annotators.items())},
        }


def convert(evidence: Evidence, shape: Shape, split: Split, filters: Filters, salt: bytes) -> Converted:
    """The rows of one shape and split. The same evidence makes the same rows, in whatever order it comes."""
    given = sorted(evidence.judgements, key=lambda one: one.id)
    others = {one.id: "other_form" for one in given if (asked := evidence.prompt_of(one)) and asked.form != filters.form}
    used = [one for one in given if one.kind in _kinds(shape, filters) and not (shape == "labels" and trust.tiers(one))]
    reasons = suspects(given, burst=filters.burst)
    sound = [one for one in given if one.id not in reasons]
    weights = trust.weights(evidence, sound, probation=filters.probation)
    reasons |= {one.id: one.status for one in sound if not trust.counted(weights, one)} | others
    heard = [one for one in sound if trust.counted(weights, one)]
    outcome = _make(evidence.of_form(filters.form), shape, filters, [one for one in used if one.id not in reasons], heard, weights)
    here = [row for row in outcome.rows if belongs(salt, row.prompt_sha256, split)]
    rows, cut = _within_shares(here, filters)
    if shape == "comparisons":
        # Only now: the pairs of a ranking are all there, or none of them is.
        rows = rankings.comparisons(rows)
    kept, elsewhere = _feedback(rows), _feedback(outcome.rows) - _feedback(here)
    dropped = {
        one.id: reasons.get(one.id) or outcome.dropped.get(one.id) or ("other_split" if one.id in elsewhere else "share")
        for one in used
        if one.id not in kept
    }
    disputes = sorted((one for one in outcome.disputes if belongs(salt, one.prompt_sha256, split)), key=lambda one: one.one_side)
    return Converted(tuple(sorted(rows, key=lambda row: (row.prompt_sha256, row.digest))), dropped, cut, tuple(disputes))


def _kinds(shape: Shape, filters: Filters) -> set[str]:
    rated = {"rating"} if filters.rating_gap and shape in ("rankings", "comparisons") else set()
    return ({*MAKES[shape]} | rated) & {*(filters.kinds or JUDGING)}


def _make(
    evidence: Evidence, shape: Shape, filters: Filters, used: Sequence[Judgement], heard: Sequence[Judgement], weights: Mapping[str, float]
) -> Outcome:
    """``heard``: all that counts, also of kinds that this export is not made of, for a flag holds everywhere."""
    flagged = frozenset(answer.key for one in heard if one.kind == "flag" for answer in evidence.judged(one))
    if shape == "prompts":
        return texts.prompts(evidence, used, judged=filters.of == "judged")
    if shape == "demonstrations":
        return texts.demonstrations(evidence, used, weights, flagged)
    if shape == "labels":
        return labels.labels(evidence, used, weights, flagged, dead_band=filters.dead_band)
    return rankings.rankings(evidence, used, weights, flagged, rating_gap=filters.rating_gap)


def _within_shares(rows: Sequence[Made], filters: Filters) -> tuple[list[Made], dict[str, int]]:
    """Cutting for one bound can break the other, so that both are held until nothing is cut any more."""
    kept, by_annotator, by_key = list(rows), 0, 0
    while True:
        fewer = capped(kept, filters.annotator_share, lambda row: row.annotators)
        least = capped(fewer, filters.key_share, lambda row: row.keys)
        if len(least) == len(kept):
            return kept, {"annotator_share": by_annotator, "key_share": by_key}
        by_annotator += len(kept) - len(fewer)
        by_key += len(fewer) - len(least)
        kept = least


def _feedback(rows: Iterable[Made]) -> set[str]:
    return {id for row in rows for id in row.feedback}

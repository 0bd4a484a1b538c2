"""The figures of a labelling: whether those who judge agree with each other, and with what is known to be right, in whatever order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from alignkit_serve import agreement
from alignkit_serve.agreement import Figure, Floats, Indices
from alignkit_serve.store.verdicts import Tiers, Verdict

_WORSE, _TIE, _BETTER = 0, 1, 2
_RATINGS = 7


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many; ``value`` is None of none."""

    hits: int
    of: int

    @property
    def value(self) -> float | None:
        """Between 0 and 1."""
        return self.hits / self.of if self.of else None


@dataclass(frozen=True, slots=True)
class Confusion:
    """An annotator's pairs beside what most of the others said of them.

    Where those put one answer first, the annotator did the same, called it a ``tie``, or ``reversed`` it; where they called it a tie, it
    was ``tied`` too, or the annotator ``split`` it.
    """

    same: int
    tie: int
    reversed: int
    tied: int
    split: int


@dataclass(frozen=True, slots=True)
class Annotator:
    """One who judged. ``agreement``: with each other annotator, over their pairs of answers; ``ties``: of all pairs, those called a tie."""

    id: str
    rankings: int
    ratings: int
    agreement: Share
    gold: Share
    ties: Share
    dwell_seconds: float | None
    confusion: Confusion


@dataclass(frozen=True, slots=True)
class Bias:
    """How often the answer shown first was among the best, on a page, beside how often it would be if the place did not matter.

    ``p``: how likely a difference as large is by chance alone, from an exact test on both sides.
    """

    page: str
    first: int
    expected: float
    of: int
    p: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers of one prompt, and how many said that ``a`` is better than ``b``, worse, or as good."""

    item: str
    a: str
    b: str
    better: int
    tie: int
    worse: int


@dataclass(frozen=True, slots=True)
class Consensus:
    """All of it; a figure is None where too few judged the same. ``alpha_pairs`` is nominal, ``alpha_ratings`` ordinal."""

    agreement: Figure | None
    alpha_pairs: Figure | None
    alpha_ratings: Figure | None
    tau: Figure | None
    annotators: tuple[Annotator, ...]
    bias: tuple[Bias, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class _Judgements:
    """Who [n] said which value [n] of which unit [n]; ``names`` of the units, and the item of each [u]."""

    who: Sequence[str]
    units: Indices
    values: Indices
    names: Sequence[tuple[str, ...]]
    items: Indices
    item_names: Sequence[str]

    @classmethod
    def of(cls, said: Mapping[tuple[str, tuple[str, ...]], int], item_of: Mapping[tuple[str, ...], str]) -> _Judgements:
        """From the value by annotator and unit."""
        names, item_names = list(item_of), sorted(set(item_of.values()))
        unit, item = {name: i for i, name in enumerate(names)}, {name: i for i, name in enumerate(item_names)}
        return cls(
            who=[annotator for annotator, _ in said],
            units=np.array([unit[name] for _, name in said], dtype=np.int64),
            values=np.array(list(said.values()), dtype=np.int64),
            names=names,
            items=np.array([item[item_of[name]] for name in names], dtype=np.int64),
            item_names=item_names,
        )


def consensus(verdicts: Iterable[Verdict], gold: Mapping[str, Tiers]) -> Consensus:
    """The figures of all that was judged, the newest of what one annotator said of one thing; ``gold``: right rankings by group."""
    every = list(verdicts)
    pairs, ratings = _pairs(every), _ratings(every)
    counts = agreement.tally(pairs.units, pairs.values, (len(pairs.names), 3))
    rated = agreement.tally(ratings.units, ratings.values, (len(ratings.names), _RATINGS))
    met = agreement.either_way(agreement.coincidences(counts))
    return Consensus(
        agreement=agreement.estimate(agreement.per_item(agreement.agreements(counts), pairs.items), agreement.share),
        alpha_pairs=agreement.estimate(agreement.per_item(met, pairs.items), lambda sums: agreement.alpha(sums, agreement.nominal)),
        alpha_ratings=agreement.estimate(
            agreement.per_item(agreement.coincidences(rated), ratings.items), lambda sums: agreement.alpha(sums, agreement.ordinal)
        ),
        tau=agreement.estimate(_correlations(every), agreement.share),
        annotators=_annotators(every, pairs, counts, _gold_pairs(gold)),
        bias=_bias(every),
        pairs=tuple(
            Pair(pairs.item_names[item], name[0], name[1], better=int(count[_BETTER]), tie=int(count[_TIE]), worse=int(count[_WORSE]))
            for name, item, count in zip(pairs.names, pairs.items, counts, strict=True)
        ),
    )


def _outcome(of_a: int, of_b: int) -> int:
    """Of the pair (a, b) by its ranks, of which the smaller is the better."""
    return _TIE if of_a == of_b else _BETTER if of_a < of_b else _WORSE


def _pairs(verdicts: Sequence[Verdict]) -> _Judgements:
    said: dict[tuple[str, tuple[str, ...]], int] = {}
    item_of: dict[tuple[str, ...], str] = {}
    for one in verdicts:
        for pair in combinations(sorted(one.ranks), 2):
            item_of.setdefault(pair, one.item)
            said[one.annotator_id, pair] = _outcome(one.ranks[pair[0]], one.ranks[pair[1]])
    return _Judgements.of(said, item_of)


def _ratings(verdicts: Sequence[Verdict]) -> _Judgements:
    rated = [one for one in verdicts if one.rating is not None]
    said: dict[tuple[str, tuple[str, ...]], int] = {(one.annotator_id, (one.target_id,)): one.rating - 1 for one in rated if one.rating}
    return _Judgements.of(said, {(one.target_id,): one.item for one in rated})


def _gold_pairs(gold: Mapping[str, Tiers]) -> dict[tuple[str, ...], int]:
    right = ({id: rank for rank, tier in enumerate(tiers) for id in tier} for tiers in gold.values())
    return {pair: _outcome(ranks[pair[0]], ranks[pair[1]]) for ranks in right for pair in combinations(sorted(ranks), 2)}


def _correlations(verdicts: Sequence[Verdict]) -> Floats:
    """For each item the sum of tau-b over pairs of annotators who ranked the same answers, and how many there were [i 2]."""
    rankings: dict[str, dict[str, Mapping[str, int]]] = {}
    sums: dict[str, list[float]] = {}
    item_of = {}
    for one in verdicts:
        if one.ranks:
            rankings.setdefault(one.target_id, {})[one.annotator_id] = one.ranks
            item_of[one.target_id] = one.item
    for target, by_annotator in rankings.items():
        for x, y in combinations(by_annotator.values(), 2):
            both = sorted(x.keys() & y.keys())
            tau = agreement.tau_b(*(np.array([ranks[id] for id in both], dtype=np.float64) for ranks in (x, y)))
            if not np.isnan(tau):
                sums.setdefault(item_of[target], []).append(tau)
    return np.array([[sum(found), len(found)] for found in sums.values()]).reshape(-1, 2)


def _annotators(
    verdicts: Sequence[Verdict], pairs: _Judgements, counts: Floats, right: Mapping[tuple[str, ...], int]
) -> tuple[Annotator, ...]:
    mine: dict[str, list[int]] = {one.annotator_id: [] for one in verdicts}
    for row, id in enumerate(pairs.who):
        mine[id].append(row)
    said: dict[str, list[Verdict]] = {id: [] for id in mine}
    for one in verdicts:
        said[one.annotator_id].append(one)
    most = agreement.majority_of_others(pairs.units, pairs.values, counts)
    return tuple(_annotator(id, said[id], np.array(mine[id], dtype=np.int64), pairs, counts, most, right) for id in sorted(mine))


def _annotator(
    id: str,
    said: Sequence[Verdict],
    rows: Indices,
    pairs: _Judgements,
    counts: Floats,
    most: Indices,
    right: Mapping[tuple[str, ...], int],
) -> Annotator:
    units, values, most = pairs.units[rows], pairs.values[rows], most[rows]
    with_me = counts[units, values] - 1
    known = [(right.get(pairs.names[unit]), value) for unit, value in zip(units.tolist(), values.tolist(), strict=True)]
    golden = [value == answer for answer, value in known if answer is not None]
    dwelt = [one.dwell_ms for one in said if one.ranks and one.dwell_ms is not None]
    ordered = (most == _WORSE) | (most == _BETTER)
    return Annotator(
        id=id,
        rankings=sum(bool(one.ranks) for one in said),
        ratings=sum(one.rating is not None for one in said),
        agreement=Share(int(with_me.sum()), int((counts[units].sum(-1) - 1).sum())),
        gold=Share(sum(golden), len(golden)),
        ties=Share(int((values == _TIE).sum()), len(values)),
        dwell_seconds=sum(dwelt) / len(dwelt) / 1000 if dwelt else None,
        confusion=Confusion(
            same=int((ordered & (values == most)).sum()),
            tie=int((ordered & (values == _TIE)).sum()),
            reversed=int((ordered & (values != _TIE) & (values != most)).sum()),
            tied=int(((most == _TIE) & (values == _TIE)).sum()),
            split=int(((most == _TIE) & (values != _TIE)).sum()),
        ),
    )


def _bias(verdicts: Sequence[Verdict]) -> tuple[Bias, ...]:
    """Per page, over rankings that put some of the answers above others and whose order on the page is known."""
    seen: dict[str, list[tuple[bool, float]]] = {}
    for one in verdicts:
        best = {id for id, rank in one.ranks.items() if rank == 1}
        if set(one.slots) == set(one.ranks) and len(best) < len(one.ranks):
            seen.setdefault(one.page, []).append((one.slots[0] in best, len(best) / len(one.ranks)))
    return tuple(
        Bias(
            page=page,
            first=(first := sum(hit for hit, _ in trials)),
            expected=sum(chance for _, chance in trials),
            of=len(trials),
            p=agreement.chance(first, np.array([chance for _, chance in trials])),
        )
        for page, trials in sorted(seen.items())
    )

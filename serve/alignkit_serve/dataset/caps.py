"""No one annotator and no one key may shape an export: of those who would, the rows beyond their share are cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from alignkit_serve.dataset.records import Made

_ROUNDING = 1e-9


Party = TypeVar("Party", str, str | None)


def capped(rows: Sequence[Made], share: float, parties: Callable[[Made], frozenset[Party]]) -> list[Made]:
    """The rows without so many that no party has more than ``share`` of the rest; which are cut depends on the rows, not on their order.

    A row counts for its parties in equal parts. Where there are too few parties for so small a share, nothing is cut.
    """
    if len({party for row in rows for party in parties(row)}) * share < 1 - _ROUNDING:
        return list(rows)
    kept = {row.digest: row for row in sorted(rows, key=lambda row: row.digest)}
    theirs: dict[Party, list[str]] = {}
    for digest, row in kept.items():
        for party in parties(row):
            theirs.setdefault(party, []).append(digest)
    for digests in theirs.values():
        # Rows that rest on nobody else are cut first; the hash decides among equals.
        digests.sort(key=lambda digest: (-len(parties(kept[digest])), digest))
    while True:
        counts = shares(kept.values(), parties)
        over = {party: count - share * len(kept) for party, count in counts.items() if count > share * len(kept) + _ROUNDING}
        if not over:
            return [row for row in rows if row.digest in kept]
        for party, excess in over.items():
            # Cutting rows makes the whole smaller too; more than this would be cut for nothing.
            wanted = max(1, math.ceil(excess / (1 - share) - _ROUNDING))
            while wanted and theirs[party]:
                wanted -= kept.pop(theirs[party].pop(), None) is not None


def shares(rows: Iterable[Made], parties: Callable[[Made], frozenset[Party]]) -> dict[Party, float]:
    """How many rows each party stands for; a row of several is divided among them."""
    counts: dict[Party, float] = {}
    for row in rows:
        found = parties(row)
        for party in found:
            counts[party] = counts.get(party, 0.0) + 1 / len(found)
    return counts

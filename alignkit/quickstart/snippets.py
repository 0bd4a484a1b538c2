"""From rated movie-review snippets to the quickstart's data: a pure function of the snippets and a seed.

The snippets are those of Hutto and Gilbert (ICWSM 2014): 10,605 sentences or two from film reviews, each rated by about
fifteen people from -4 (extremely negative) to 4 (extremely positive).
"""

from __future__ import annotations

import html
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from alignkit.errors import DataError

Rows = list[dict[str, Any]]

SHORT = range(6, 19)
"""Words of the snippets that are read whole, by the policy and by the reward model: short ones make short updates."""
LONG = range(19, 31)
"""Words of the snippets that lend only their opening words, or that only the judge reads."""
OPENING = 3
"""Most words of an opening."""
TIE = 0.5
"""Mean ratings closer than this, in points of the scale, are not told apart."""


@dataclass(frozen=True, slots=True)
class Snippet:
    """A piece of a review; ``rating`` is the mean of its raters, in [-4, 4]."""

    id: str
    rating: float
    text: str

    @property
    def words(self) -> list[str]:
        """The text's words, punctuation attached."""
        return self.text.split()


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows of each file."""

    demonstrations: int = 1000
    demonstrations_validation: int = 100
    rankings: int = 350
    rankings_validation: int = 60
    prompts: int = 600
    prompts_heldout: int = 200
    ratings_heldout: int = 600


def parse(text: str, origin: str) -> list[Snippet]:
    """The snippets of a ground-truth file: a header, then ``id``, mean rating and text, separated by tabs.

    Texts are cleaned; those that are not whole sentences of plain words are left out, and so are repeated ones.
    """
    found: dict[str, Snippet] = {}
    for number, line in enumerate(text.splitlines()[1:], start=2):
        fields = line.split("\t")
        try:
            identity, rating, raw = fields[0], float(fields[1]), fields[2]
        except (IndexError, ValueError):
            raise DataError(f"{origin}:{number}: expected id, rating and text separated by tabs, found {line[:60]!r}") from None
        cleaned = clean(raw)
        if _WHOLE.fullmatch(cleaned):
            found.setdefault(cleaned, Snippet(identity, rating, cleaned))
    return list(found.values())


_WHOLE = re.compile(r"[A-Z][^*()]*[.!?][\"']?")
"""Begins with a capital, ends as a sentence does, holds no editorial bracket and no word that was starred out."""


def clean(text: str) -> str:
    """Undo what the collection did to the text: entities, doubled quotes, dashes that became runs of blanks, loose ellipses."""
    text = html.unescape(text).replace("''", '"').replace("`", "'").replace("’", "'").strip()
    text = re.sub(r"\s*–\s*|\s{2,}", " - ", text)
    text = re.sub(r"\s*\.{2,}\s*", "... ", text).strip()
    return re.sub(r"\s+([,.!?;:)])", r"\1", text)


def build(snippets: Iterable[Snippet], *, seed: int, sizes: Sizes | None = None) -> dict[str, Rows]:
    """The rows of each file, by file name. No snippet serves in two files.

    The form is plain text to be continued: a prompt is a snippet's opening words, a completion or response is the rest, its
    leading blank included. Raises ``DataError`` when there are too few snippets.
    """
    sizes = sizes or Sizes()
    shuffled = sorted(snippets, key=lambda snippet: snippet.id)
    random.Random(seed).shuffle(shuffled)
    short = [snippet for snippet in shuffled if len(snippet.words) in SHORT]
    long = [snippet for snippet in shuffled if len(snippet.words) in LONG]

    demonstrations = _take(short, sizes.demonstrations + sizes.demonstrations_validation, "demonstrations")
    ranked = _take(rankings(short), sizes.rankings + sizes.rankings_validation, "rankings")
    random.Random(seed).shuffle(ranked)
    prompts = _take(_distinct_openings(long), sizes.prompts + sizes.prompts_heldout, "prompts")
    used = {identity for row in ranked for identity in row["id"].split("-")} | {snippet.id for snippet in prompts}
    unused = [snippet for snippet in short + long if snippet.id not in used]
    random.Random(seed).shuffle(unused)
    rated = _take(unused, sizes.ratings_heldout, "ratings")
    return {
        "demonstrations.jsonl": [demonstration(s) for s in demonstrations[: sizes.demonstrations]],
        "demonstrations.validation.jsonl": [demonstration(s) for s in demonstrations[sizes.demonstrations :]],
        "rankings.jsonl": ranked[: sizes.rankings],
        "rankings.validation.jsonl": ranked[sizes.rankings :],
        "prompts.jsonl": [prompt(s) for s in prompts[: sizes.prompts]],
        "prompts.heldout.jsonl": [prompt(s) for s in prompts[sizes.prompts :]],
        "ratings.heldout.jsonl": [rated_response(s) for s in rated],
    }


def demonstration(snippet: Snippet) -> dict[str, Any]:
    """A snippet as a demonstration; the rating plays no part, because this teaches the genre and not the sentiment."""
    opening, rest = split(snippet.text, OPENING)
    return {"id": snippet.id, "prompt": opening, "completion": rest}


def prompt(snippet: Snippet) -> dict[str, Any]:
    """A snippet's opening words, to be continued."""
    return {"id": snippet.id, "prompt": split(snippet.text, OPENING)[0]}


def rated_response(snippet: Snippet) -> dict[str, Any]:
    """A snippet as a response that people have rated."""
    opening, rest = split(snippet.text, OPENING)
    return {"id": snippet.id, "prompt": opening, "response": rest, "rating": round(snippet.rating, 3)}


def rankings(snippets: Sequence[Snippet]) -> Rows:
    """Rankings of three to seven snippets that begin alike, those that share the most words first; a snippet is used once.

    Each group, sorted by rating, is dealt out like cards, so that every ranking spans the whole range of its group.
    """
    rows: Rows = []
    left = list(snippets)
    for shared in range(OPENING, 0, -1):
        groups: dict[str, list[Snippet]] = defaultdict(list)
        for snippet in left:
            groups[split(snippet.text, shared)[0]].append(snippet)
        for opening, group in groups.items():
            group.sort(key=lambda snippet: -snippet.rating)
            hands = (len(group) + 1) // 4 if len(group) >= 4 else 0
            for hand in (group[i::hands] for i in range(hands)):
                places = ranks([snippet.rating for snippet in hand])
                if places[-1] == 1:  # One single tie teaches nothing.
                    continue
                responses = [split(snippet.text, shared)[1] for snippet in hand]
                identity = "-".join(snippet.id for snippet in hand)
                rows.append({"id": identity, "prompt": opening, "responses": responses, "ranks": places})
        used = {identity for row in rows for identity in row["id"].split("-")}
        left = [snippet for snippet in left if snippet.id not in used]
    return rows


def ranks(ratings: Sequence[float]) -> list[int]:
    """Ranks of falling ratings, 1 the best: a new rank begins where the step from the one before is at least ``TIE``.

    Ties made so are transitive: ratings of two ranks always differ by ``TIE`` or more.
    """
    result = [1]
    for better, worse in pairwise(ratings):
        result.append(result[-1] + (better - worse >= TIE))
    return result


def split(text: str, words: int) -> tuple[str, str]:
    """The first ``words`` words, and the rest with its leading blank."""
    opening = " ".join(text.split(" ")[:words])
    return opening, text[len(opening) :]


def _distinct_openings(snippets: Iterable[Snippet]) -> list[Snippet]:
    """The first snippet of each opening, openings that already end a clause left out."""
    found: dict[str, Snippet] = {}
    for snippet in snippets:
        opening = split(snippet.text, OPENING)[0]
        if re.fullmatch(r"[A-Za-z' ]+", opening):
            found.setdefault(opening, snippet)
    return list(found.values())


def _take(rows: list[Any], count: int, what: str) -> list[Any]:
    """Remove and return the first ``count``."""
    if len(rows) < count:
        raise DataError(f"{what}: {count} are asked for and only {len(rows)} can be made of these snippets; is the file complete?")
    taken, rows[:] = rows[:count], rows[count:]
    return taken

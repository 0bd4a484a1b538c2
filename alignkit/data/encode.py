"""Records to token rows within a length, and the count of what was kept, truncated and dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from alignkit.data.codec import TemplateCodec
from alignkit.data.sources import shown
from alignkit.errors import DataError
from alignkit.interfaces import Codec
from alignkit.types import Demonstration, Overlong, Prompt, PromptRow, RankedRows, Ranking, TokenRow

Out = TypeVar("Out", covariant=True)


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What became of the rows: how many were kept as they are, and the ids of those that were cut or left out.

    ``merged``: those whose completion begins inside a token of the prompt, which is then trained and never seen in a rollout.
    """

    kept: int
    truncated: tuple[str, ...]
    dropped: tuple[str, ...]
    tokens: int
    longest: int
    merged: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "kept": self.kept,
            "truncated": len(self.truncated),
            "dropped": len(self.dropped),
            "merged": len(self.merged),
            "truncated_ids": list(self.truncated),
            "dropped_ids": list(self.dropped),
            "merged_ids": list(self.merged),
            "tokens": self.tokens,
            "longest": self.longest,
        }


@dataclass(frozen=True, slots=True)
class Encoded(Generic[Out]):
    """Rows with their report."""

    rows: tuple[Out, ...]
    report: EncodeReport


@dataclass
class _Tally:
    kept: int = 0
    truncated: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


class _Shorten(Protocol[Out]):
    def __call__(self, row: Any, max_length: int) -> Out | None: ...


def encode_demonstrations(
    codec: TemplateCodec, records: Sequence[Demonstration], *, max_length: int, overlong: Overlong
) -> Encoded[TokenRow]:
    """Too long: the end is cut, and no end-of-turn is faked; without a trained token left the row is dropped."""
    found = _encode(records, codec.demonstration, _cut_end, len, max_length, overlong, "demonstration")
    prompts = {record.prompt.id: codec.prompt(record.prompt) for record in records if record.prompt.plain}
    merged = tuple(row.id for row in found.rows if row.loss_mask.index(True) < len(prompts.get(row.id, ())))
    return replace(found, report=replace(found.report, merged=merged))


def encode_rankings(codec: TemplateCodec, records: Sequence[Ranking], *, max_length: int, overlong: Overlong) -> Encoded[RankedRows]:
    """Too long: the prompt loses its beginning, the same for all responses; responses are never cut, their end is what is scored."""
    return _encode(records, codec.ranked, _cut_prompts, _longest, max_length, overlong, "ranking")


def encode_prompts(codec: Codec, records: Sequence[Prompt], *, max_length: int, overlong: Overlong) -> Encoded[PromptRow]:
    """Too long: the beginning is cut."""

    def row(prompt: Prompt) -> PromptRow:
        ids = codec.prompt(prompt)
        if not ids:
            raise DataError("it has no token at all; a response needs something to follow")
        return PromptRow(prompt, ids)

    return _encode(records, row, lambda row, n: replace(row, ids=row.ids[-n:]), lambda row: len(row.ids), max_length, overlong, "prompt")


def _encode(
    records: Sequence[Any],
    encode: Callable[[Any], Out],
    shorten: _Shorten[Out],
    length: Callable[[Any], int],
    max_length: int,
    overlong: Overlong,
    noun: str,
) -> Encoded[Out]:
    tally, rows = _Tally(), []
    for record in records:
        prompt = record if isinstance(record, Prompt) else record.prompt
        where = f"{prompt.origin}: " if prompt.origin else ""
        name, place = prompt.id, f"{where}{noun} {prompt.id!r} ({shown(prompt.messages[-1].content, 60)})"
        try:
            row = encode(record)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if length(row) <= max_length:
            tally.kept += 1
            rows.append(row)
            continue
        if overlong == "error":
            raise DataError(
                f"{place}: it has {length(row)} tokens, more than max_length {max_length}; "
                "raise max_length, or set overlong: drop or overlong: truncate (both are counted in the manifest)"
            )
        short = shorten(row, max_length) if overlong == "truncate" else None
        if short is None:
            tally.dropped.append(name)
        else:
            tally.truncated.append(name)
            rows.append(short)
    sizes = [length(row) for row in rows]
    tokens = sum(sum(map(len, row.rows)) if isinstance(row, RankedRows) else size for row, size in zip(rows, sizes, strict=True))
    report = EncodeReport(tally.kept, tuple(tally.truncated), tuple(tally.dropped), tokens, max(sizes, default=0))
    return Encoded(tuple(rows), report)


def _cut_end(row: TokenRow, max_length: int) -> TokenRow | None:
    mask = row.loss_mask[:max_length]
    if not any(mask[1:]):
        return None
    # The cut may fall into a turn that is not trained: nothing learns from what follows the last trained token.
    end = len(mask) - mask[::-1].index(True)
    return TokenRow(row.id, row.ids[:end], mask[:end])


def _cut_prompts(row: RankedRows, max_length: int) -> RankedRows | None:
    excess = _longest(row) - max_length
    prompt = min(one.loss_mask.index(True) for one in row.rows)
    if excess >= prompt:
        return None
    return replace(row, rows=tuple(TokenRow(one.id, one.ids[excess:], one.loss_mask[excess:]) for one in row.rows))


def _longest(row: RankedRows) -> int:
    return max(len(one) for one in row.rows)

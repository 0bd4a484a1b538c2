"""Where a reward model's zero is, and its unit: the loss knows neither, so they are set once, when the model is saved."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignkit.api import Component, Context, DataError, DataSource, RankedRows, TokenRow
from alignkit.data.codec import TemplateCodec
from alignkit.data.encode import encode_demonstrations
from alignkit.data.records import demonstrations

_ROWS = 1024
"""At most so many rows are scored for it, from the top of the data."""


def normalization(scores: Sequence[float], *, scale: bool) -> tuple[float, float]:
    """Offset and gain that give ``scores`` mean 0 and, with ``scale``, std 1 (biased): (score - offset) * gain."""
    mean = math.fsum(scores) / len(scores)
    std = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    # Scores that do not differ have no unit, and dividing by nearly nothing would only blow noise up.
    return mean, 1.0 / std if scale and std > 1e-6 else 1.0


def response_rows(rankings: Sequence[RankedRows]) -> list[TokenRow]:
    """The responses of the training rankings."""
    return [row for ranking in rankings for row in ranking.rows][:_ROWS]


def demonstration_rows(source: Component[DataSource], context: Context, codec: TemplateCodec) -> list[TokenRow]:
    """Demonstrations no longer than what the model was trained on; a longer one is left out, and how many were is said."""
    records = demonstrations(list(context.build_data(source).rows()))
    longest = max(len(row) for ranking in context.rows for row in ranking.rows)
    encoded = encode_demonstrations(codec, records, max_length=longest, overlong="drop")
    if not encoded.rows:
        raise DataError(f"none of the {len(records)} demonstrations is as short as the longest ranked response ({longest} tokens)")
    if dropped := len(encoded.report.dropped):
        context.say(f"reward model: {dropped} of {len(records)} demonstrations are longer than any ranked response, and do not count")
    return list(encoded.rows[:_ROWS])

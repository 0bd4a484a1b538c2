"""Text and JSON as both databases can keep them and give them back equal.

PostgreSQL stores neither NUL nor half a surrogate pair, and a model or a client may well send them: refusing would lose the whole answer
for one character, so each becomes U+FFFD, on SQLite too. What a model really said is kept by its token ids.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from alignkit_serve.store.errors import StoreError

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def clean(text: str) -> str:
    """``text`` with U+FFFD in place of what no database keeps."""
    return _UNSTORABLE.sub("\ufffd", text)


def plain(value: Any) -> Any:
    """A JSON value as it comes back from either database. Raises ``StoreError`` for numbers that JSON does not have."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return {clean(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def json_text(value: Any) -> str:
    """The JSON of a ``plain`` value, written in one way only: what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _number(value: float) -> float | int:
    if not math.isfinite(value):
        raise StoreError(f"{value} is not JSON and cannot be stored; send a finite number or null")
    # JSONB keeps decimal numbers: no exponents, so that 1e23 would come back as the integer 10**23, and no negative zero.
    return int(value) if abs(value) >= 1e16 else value + 0.0

"""Ids that sort by the time they were made (UUID version 7, RFC 9562)."""

from __future__ import annotations

import secrets
import threading
import time

_LOCK = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """``prefix`` and 32 hexadecimal digits; larger than every id this process made before, even if the clock was set back."""
    global _last
    with _LOCK:
        # Milliseconds, then the 74 bits that RFC 9562 leaves free as one random counter, its highest bit 0 to have room (6.2, method 2).
        fresh = time.time_ns() // 1_000_000 << 74 | secrets.randbits(73)
        _last = number = fresh if fresh > _last else _last + 1 + secrets.randbits(32)
    milliseconds, high, low = number >> 74, number >> 62 & 0xFFF, number & (1 << 62) - 1
    return f"{prefix}{milliseconds << 80 | 7 << 76 | high << 64 | 2 << 62 | low:032x}"

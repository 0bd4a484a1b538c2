"""Random choices that are pure functions of where they are made: nothing to save, nothing to restore. Torch-free."""

from __future__ import annotations

import hashlib


def derived_seed(*place: object) -> int:
    """A 63-bit seed from the run's seed and whatever tells one choice from another: a stage, a step, a prompt."""
    digest = hashlib.blake2b("/".join(map(str, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

"""Which prompts are held out: decided once, by a secret of the store and the prompt alone, and so for ever and for every round."""

from __future__ import annotations

import hashlib

from alignkit_serve.dataset.filters import Split

HELD_OUT = 0.1
"""The share of all prompts that no training ever sees."""


def in_holdout(salt: bytes, prompt_sha256: str) -> bool:
    """Whether a prompt is held out."""
    drawn = int.from_bytes(hashlib.sha256(salt + prompt_sha256.encode()).digest()[:8])
    return drawn < HELD_OUT * 2**64


def belongs(salt: bytes, prompt_sha256: str, split: Split) -> bool:
    """Whether a prompt is of a split; ``all`` is both."""
    return split == "all" or (split == "holdout") == in_holdout(salt, prompt_sha256)


def salt_sha256(salt: bytes) -> str:
    """By which two exports are known to be split alike, without giving the secret away."""
    return hashlib.sha256(salt).hexdigest()

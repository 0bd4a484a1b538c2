"""Tokens for browsers: whoever holds one may judge the answers of one inference, as one person, for a while. They are nowhere stored."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

PREFIX = "ft_"

SECRET = "feedback-tokens"
"""The name of the secret that they are signed under."""


@dataclass(frozen=True, slots=True)
class Pass:
    """``subject``: the hash of whom it was given to; ``api_key_id``: who gave it, and who can put it out of force with their key."""

    inference_id: str
    subject: str
    api_key_id: str | None
    expires: int

    def text(self, secret: bytes) -> str:
        """What is sent."""
        said = json.dumps(list(asdict(self).values()), separators=(",", ":")).encode()
        return f"{PREFIX}{_letters(said)}.{_letters(_signed(said, secret))}"


def read(text: str, secret: bytes) -> Pass | None:
    """The pass whose text this is, if it was made here and is not over."""
    said, _, signature = text.removeprefix(PREFIX).partition(".")
    try:
        content, signed = _bytes(said), _bytes(signature)
    except (binascii.Error, ValueError):
        return None
    if not hmac.compare_digest(signed, _signed(content, secret)):
        return None
    found = Pass(*json.loads(content))
    return found if found.expires > datetime.now(UTC).timestamp() else None


def _signed(said: bytes, secret: bytes) -> bytes:
    return hmac.new(secret, said, hashlib.sha256).digest()


def _letters(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(letters: str) -> bytes:
    return base64.b64decode(letters.encode("ascii") + b"=" * (-len(letters) % 4), altchars=b"-_", validate=True)

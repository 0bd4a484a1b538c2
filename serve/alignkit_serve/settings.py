"""What the server allows. Every number here is an option of ``alignkit serve`` or a limit that the documentation states."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes are counted before anything is tokenised; seconds are wall time."""

    body_bytes: int = 1 << 20
    batch_bytes: int = 8 << 20
    prompt_characters: int = 400_000
    choices: int = 16
    rows: int = 32
    """Answers that grow at once, of one policy version."""
    queued_requests: int = 128
    """Answers admitted in all: growing, or waiting for their first token."""
    queued_tokens: int = 65_536
    """Prompt tokens of the answers that have none yet."""
    first_token_seconds: float = 120.0
    total_seconds: float = 600.0
    write_seconds: float = 30.0
    """How long the last events of an answer wait for a reader."""
    drain_seconds: float = 30.0
    unread_events: int = 64
    """Events of an answer that its reader has not taken; with more, the answer is cancelled."""
    ping_seconds: float = 15.0
    default_max_tokens: int | None = None
    """Tokens of an answer where the request names no number; None: as many as the context has room for."""
    feedback_per_target_rpm: int = 120
    """Feedback on one target in a minute, whoever gives it."""

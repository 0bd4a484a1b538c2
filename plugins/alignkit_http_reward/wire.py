"""What is sent and what may come back: JSON, described by two schemas, and read with suspicion."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.api import RunError, Sample, Score

REQUEST_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["samples"],
    "properties": {
        "samples": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["id", "prompt", "response", "finished", "metadata"],
                "properties": {
                    "id": {"type": "string", "description": "the prompt's id and the sample's number among those of its prompt"},
                    "prompt": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["role", "content"],
                            "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
                        },
                    },
                    "response": {"type": "string"},
                    "finished": {"type": "boolean", "description": "false: the response was cut off at its length limit"},
                    "metadata": {"type": "object", "description": "the other columns of the prompt's row"},
                },
            },
        }
    },
}
"""The body of a request."""

RESPONSE_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["scores"],
    "properties": {
        "scores": {
            "type": "array",
            "description": "one a sample, in the same order",
            "items": {
                "type": "object",
                "required": ["value"],
                "properties": {
                    "value": {"type": ["number", "null"], "description": "higher is better; null: no verdict"},
                    "parts": {
                        "type": "object",
                        "propertyNames": {"pattern": "^[A-Za-z0-9_-]+$"},
                        "additionalProperties": {"type": "number"},
                        "description": "what the value was made of; each is logged as reward/part.NAME_mean",
                    },
                    "reason": {"type": ["string", "null"], "description": "why there is no verdict"},
                },
            },
        }
    },
}
"""The body of an answer. Keys beyond these are allowed, and not looked at."""

BYTES_PER_SAMPLE = 64 * 1024
"""An answer is not read beyond this many bytes a sample."""


class Garbled(Exception):
    """What came is not JSON, such as a proxy's page or half an answer: asked again, the service may do better."""


class WrongAnswer(Exception):
    """What came is an answer and cannot be used: asked again, the service would say the same."""


def request_body(samples: Sequence[Sample]) -> bytes:
    """The samples as JSON. Raises ``RunError`` for metadata that JSON does not have."""
    return b'{"samples": [' + b", ".join(map(_encoded, samples)) + b"]}"


def read_scores(body: bytes, count: int) -> list[Score]:
    """The ``count`` scores that a service sent. Raises ``Garbled`` or ``WrongAnswer``."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Garbled(f"an answer that is not JSON: {shown(body)}") from error
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise WrongAnswer(f'answered {shown(body)}; needed: {{"scores": [...]}}')
    if len(scores) != count:
        raise WrongAnswer(f"answered {len(scores)} scores for {count} samples; one each is needed, in the same order")
    return [_score(found, f"scores[{i}]") for i, found in enumerate(scores)]


def shown(body: bytes) -> str:
    """The beginning of an answer, fit for a message."""
    text = " ".join(body[:400].decode(errors="replace").split())
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return (text if len(text) <= 100 and len(body) <= 400 else f"{text[:100]}...") or "nothing"


def _encoded(sample: Sample) -> bytes:
    asked = {
        "id": sample.id,
        "prompt": [{"role": message.role, "content": message.content} for message in sample.prompt.messages],
        "response": sample.response,
        "finished": sample.finished,
        "metadata": dict(sample.prompt.metadata),
    }
    try:
        # ASCII with escapes: half a surrogate pair, which data may hold, has no UTF-8.
        return json.dumps(asked, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RunError(
            f"{sample.prompt.origin or sample.prompt.id}: the prompt's other columns cannot be sent to a reward service as JSON ({error}); "
            "leave out or convert what is not text, a finite number, true, false, empty, a list or a mapping"
        ) from error


def _score(found: Any, place: str) -> Score:
    if not isinstance(found, dict) or "value" not in found:
        raise WrongAnswer(f"answered {_json(found)} as {place}; needed: a mapping with a `value`")
    parts, reason = found.get("parts") or {}, found.get("reason")
    if not isinstance(parts, dict):
        raise WrongAnswer(f"answered {_json(parts)} as {place}.parts; allowed: a mapping of names to numbers")
    for name in parts:
        if not re.fullmatch("[A-Za-z0-9_-]+", name):
            raise WrongAnswer(f"answered a part named {_json(name)} in {place}; allowed: letters, digits, _ and -")
    if reason is not None and not isinstance(reason, str):
        raise WrongAnswer(f"answered {_json(reason)} as {place}.reason; allowed: text")
    numbers = {name: _number(part, f"{place}.parts.{name}") for name, part in parts.items()}
    if found["value"] is None:
        return Score(None, numbers, reason=reason or "the service has no verdict")
    return Score(_number(found["value"], f"{place}.value"), numbers, reason=reason)


def _number(found: Any, place: str) -> float:
    try:
        if not isinstance(found, bool) and isinstance(found, int | float) and math.isfinite(found):
            return float(found)
    except OverflowError:
        pass  # A whole number beyond what a float holds; it is shown below like any other that is none.
    raise WrongAnswer(f"answered {_json(found)} as {place}; allowed: a finite number{' or null' if place.endswith('.value') else ''}")


def _json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."

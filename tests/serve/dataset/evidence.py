"""Evidence made by hand: prompts by a letter, answers by an id, and what people said of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from alignkit_serve.dataset.conversion import Converted, convert
from alignkit_serve.dataset.filters import Filters, Shape, Split
from alignkit_serve.dataset.records import Answer, Asked, Evidence, Judgement

BEGIN = datetime(2026, 5, 4, tzinfo=UTC)
LOOSE: dict[str, Any] = {"probation": 0, "annotator_share": 1.0, "key_share": 1.0, "burst": 0}
"""Filters that let everything through."""

SALT = b"salt"


def asked(prompt: str, role: str = "user") -> Asked:
    return Asked(f"inf-{prompt}", ({"role": role, "content": prompt},), hashlib.sha256(prompt.encode()).hexdigest(), "pol-1")


def evidence(prompts: Mapping[str, Mapping[str, str]], said: Iterable[Judgement]) -> Evidence:
    """``prompts``: by prompt the texts of its answers, by id."""
    questions = {f"inf-{prompt}": asked(prompt) for prompt in prompts}
    answers = {id: Answer(id, text, "pol-1", questions[f"inf-{prompt}"]) for prompt, texts in prompts.items() for id, text in texts.items()}
    return Evidence(tuple(said), questions, answers, {f"inf-{prompt}": tuple(texts) for prompt, texts in prompts.items()})


def said(number: int, kind: str, value: Any, target: str, *, by: str = "ann", of: str = "q", **values: Any) -> Judgement:
    """Judgement number ``number``, ``of`` a prompt; its target is an answer, unless its kind is about several."""
    group = kind in ("preference", "ranking", "demonstration")
    made = {
        "id": f"fb-{number:04}",
        "kind": kind,
        "target_type": "inference" if group else "completion",
        "target_id": target,
        "annotator_id": by,
        "api_key_id": "key",
        "value": value,
        "occurred_at": BEGIN + timedelta(minutes=number),
        "inference_id": f"inf-{of}",
    }
    return Judgement(**{**made, **values})


def prefers(number: int, better: str, worse: str, *, strength: int | None = None, **values: Any) -> Judgement:
    choice = {"a": worse, "b": better, "choice": "b"} | ({"strength": strength} if strength else {})
    return said(number, "preference", choice, f"inf-{values.get('of', 'q')}", **values)


def converted(given: Evidence, shape: Shape, split: Split = "all", salt: bytes = SALT, **filters: Any) -> Converted:
    return convert(given, shape, split, Filters(**{**LOOSE, **filters}), salt)


def rows(given: Evidence, shape: Shape, **filters: Any) -> list[dict[str, Any]]:
    """The values of all rows, without the prompt."""
    return [{name: value for name, value in row.values.items() if name != "prompt"} for row in converted(given, shape, **filters).rows]

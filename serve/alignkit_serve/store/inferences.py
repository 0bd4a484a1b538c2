"""What was asked and what was answered: a row before the first token leaves, completed before the client is told that it is done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, bindparam, exists, func, insert, select, update
from sqlalchemy.sql import ColumnElement

from alignkit_serve.store.errors import StoreError
from alignkit_serve.store.tables import Json, completion, fields_of, inference
from alignkit_serve.store.values import json_text, plain

Ending = Literal["done", "error", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """All that is known before the first token. A prompt that is no conversation is one message of the role ``prompt``.

    ``model`` is the name the client asked for; ``metadata`` is the client's own; ``prompt_sha256`` is that of the function below.
    """

    id: str
    endpoint: Literal["chat", "completions", "import"]
    model: str
    request_id: str
    api_key_id: str | None = None
    episode_id: str | None = None
    end_user_hmac: str | None = None
    messages: list[dict[str, str]]
    prompt_sha256: str
    params: dict[str, Any]
    metadata: dict[str, str]
    seed: int
    policy_version_id: str
    engine: str
    consent_train: bool
    consent_version: str | None = None
    retention_until: datetime | None = None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer. Log-probs are kept as float32: ``raw`` of the model as it is, ``behaviour`` of the distribution it was drawn from.

    ``policy_spans`` says which tokens came from which policy, where more than one had a part in it.
    """

    id: str
    inference_id: str
    idx: int
    text: str
    token_ids: tuple[int, ...]
    raw_logprobs: tuple[float, ...] | None
    behaviour_logprobs: tuple[float, ...] | None
    finish_reason: str
    policy_version_id: str
    policy_spans: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class StoredInference:
    """An inference as it is now, with its completions in the order of their index."""

    inference: Inference
    completions: tuple[Completion, ...]
    status: Literal["running", "done", "error", "cancelled", "aborted"]
    redaction: Literal["none", "applied", "erased"]
    prompt_tokens: int | None
    completion_tokens: int | None
    finished_at: datetime | None


_ASKED = [inference.c[name] for name in Inference.__dataclass_fields__]
_ANSWERED = [completion.c[name] for name in Completion.__dataclass_fields__]
_STATE = [inference.c[name] for name in ("status", "redaction", "prompt_tokens", "completion_tokens", "finished_at")]


def prompt_sha256(messages: Sequence[Mapping[str, str]]) -> str:
    """The hash by which equal prompts are found: of the messages' canonical JSON, as it is stored."""
    return hashlib.sha256(json_text(plain(messages)).encode()).hexdigest()


def begin(connection: Connection, asked: Inference, *, redacted: bool = False) -> None:
    """Add an inference that is running from now on. ``redacted``: its messages are not quite what was sent."""
    connection.execute(insert(inference), {**fields_of(asked), "status": "running", "redaction": "applied" if redacted else "none"})


def finish(
    connection: Connection,
    inference_id: str,
    completions: Sequence[Completion],
    *,
    status: Ending,
    prompt_tokens: int,
    completion_tokens: int,
    redacted: bool = False,
) -> None:
    """End a running inference, with as many completions as there are. Raises ``StoreError`` for one that is not running.

    ``redacted``: a completion's text is not quite what was answered.
    """
    running = (inference.c.id == inference_id, inference.c.status == "running")
    counted = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "finished_at": datetime.now(UTC)}
    values = {"status": status, **counted, **({"redaction": "applied"} if redacted else {})}
    if connection.execute(update(inference).where(*running).values(values)).rowcount == 0:
        raise StoreError(f"inference {inference_id!r} is not running, and only a running one can be finished")
    if completions:
        connection.execute(insert(completion), [fields_of(each) for each in completions])


def sweep(connection: Connection) -> int:
    """Mark what a server that is gone left running as aborted; returns how many there were. For the start, before the first request."""
    running = inference.c.status == "running"
    return connection.execute(update(inference).where(running).values(status="aborted", finished_at=datetime.now(UTC))).rowcount


def get(connection: Connection, id: str, *, api_key_id: str | None = None) -> StoredInference | None:
    """By id; where ``api_key_id`` is given, only if it is that key's own. What was erased is not found."""
    rows = connection.execute(select(*_ASKED, *_STATE).where(*_visible(id, api_key_id))).all()
    return next(iter(_stored(connection, rows)), None)


def listed(
    connection: Connection,
    *,
    api_key_id: str | None = None,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    after: str | None = None,
    limit: int = 20,
    order: Literal["asc", "desc"] = "asc",
) -> tuple[list[StoredInference], bool]:
    """Chat completions that were answered, ``limit`` of them in the order of their ids, and whether there are more.

    Only those after the id ``after``, with the given model, and with each of the items of ``metadata``.
    """
    id = inference.c.id
    wanted = [inference.c.endpoint == "chat", inference.c.status == "done", inference.c.redaction != "erased"]
    if api_key_id is not None:
        wanted.append(inference.c.api_key_id == api_key_id)
    if model is not None:
        wanted.append(inference.c.model == model)
    if after is not None:
        wanted.append(id > after if order == "asc" else id < after)
    wanted += [_has(connection, key, value) for key, value in (metadata or {}).items()]
    found = select(*_ASKED, *_STATE).where(*wanted).order_by(id if order == "asc" else id.desc()).limit(limit + 1)
    rows = connection.execute(found).all()
    return _stored(connection, rows[:limit]), len(rows) > limit


def set_metadata(connection: Connection, id: str, metadata: Mapping[str, str], *, api_key_id: str | None = None) -> bool:
    """Replace the client's metadata; False if ``get`` would not find it."""
    return connection.execute(update(inference).where(*_visible(id, api_key_id)).values(metadata=metadata)).rowcount > 0


def delete(connection: Connection, id: str, *, api_key_id: str | None = None) -> bool:
    """Erase what was said, by the client and by the model; the row stays, for what refers to it.

    False if ``get`` would not find it, and as long as it is running. What others made of it stays: see ``erasure``.
    """
    mine = (*_visible(id, api_key_id), inference.c.status != "running")
    if connection.execute(select(inference.c.id).where(*mine)).one_or_none() is None:
        return False
    erase(connection, [id])
    return True


def erase(connection: Connection, ids: Sequence[str]) -> int:
    """Leave no word in the inferences with these ids, and nothing by which a prompt could be guessed; returns how many answers they had."""
    nothing: dict[str, Any] = {
        "messages": [],
        "prompt_sha256": "",
        "params": {},
        "metadata": {},
        "end_user_hmac": None,
        "redaction": "erased",
    }
    connection.execute(update(inference).where(inference.c.id.in_(ids)).values(nothing))
    silence = {"text": "", "token_ids": (), "raw_logprobs": None, "behaviour_logprobs": None}
    return connection.execute(update(completion).where(completion.c.inference_id.in_(ids)).values(silence)).rowcount


def _visible(id: str, api_key_id: str | None) -> list[ColumnElement[bool]]:
    own = [inference.c.api_key_id == api_key_id] if api_key_id is not None else []
    return [inference.c.id == id, inference.c.redaction != "erased", *own]


def _has(connection: Connection, key: str, value: str) -> ColumnElement[bool]:
    if connection.dialect.name == "postgresql":
        return inference.c.metadata.op("@>", is_comparison=True)(bindparam(None, {key: value}, type_=Json()))
    # A path as $."key" has no way to write a key with a quotation mark.
    item = func.json_each(inference.c.metadata).table_valued("key", "value")
    return exists(select(1).select_from(item).where(item.c.key == key, item.c.value == value))


def _stored(connection: Connection, rows: Sequence[Row[Any]]) -> list[StoredInference]:
    ids = [row.id for row in rows]
    completions: dict[str, list[Completion]] = {id: [] for id in ids}
    for answer in connection.execute(select(*_ANSWERED).where(completion.c.inference_id.in_(ids)).order_by(completion.c.idx)):
        completions[answer.inference_id].append(Completion(**answer._mapping))
    return [
        StoredInference(
            Inference(**{column.name: row._mapping[column.name] for column in _ASKED}),
            tuple(completions[row.id]),
            **{column.name: row._mapping[column.name] for column in _STATE},
        )
        for row in rows
    ]

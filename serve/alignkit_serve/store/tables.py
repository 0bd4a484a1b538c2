"""The tables, as both databases have them. ``migrations/`` makes them; a test holds the two together."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeEngine

from alignkit_serve.store.values import clean, plain

REVISIONS = "alignkit_revision"
"""The table in which alembic notes the revision: one of our own, for a database may be shared with others who use alembic."""


class Words(TypeDecorator[str]):
    """Text of any characters; see ``values`` for the few that are replaced."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Python to database."""
        return None if value is None else clean(value)


class Json(TypeDecorator[Any]):
    """JSON, and JSONB on PostgreSQL; None is NULL."""

    impl = JSON
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """What the database calls it."""
        return dialect.type_descriptor(JSONB(none_as_null=True) if dialect.name == "postgresql" else JSON(none_as_null=True))

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Python to database."""
        return plain(value)


class Moment(TypeDecorator[datetime]):
    """A point in time, to the microsecond; aware, and UTC when it comes back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Python to database."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value} has no timezone")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Database to Python."""
        # SQLite keeps no timezone; PostgreSQL gives the session's.
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Numbers(TypeDecorator[Sequence[Any]]):
    """Numbers as little-endian bytes: format ``i`` is int32, ``f`` float32; a tuple when they come back."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, format: str) -> None:
        super().__init__()
        self.format = format

    def process_bind_param(self, value: Sequence[Any] | None, dialect: Dialect) -> bytes | None:
        """Python to database."""
        return None if value is None else struct.pack(f"<{len(value)}{self.format}", *value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> tuple[Any, ...] | None:
        """Database to Python."""
        return None if value is None else struct.unpack(f"<{len(value) // 4}{self.format}", value)


def fields_of(record: Any) -> dict[str, Any]:
    """A record's fields by name, which are its columns. Nothing is copied, as ``asdict`` would."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


metadata = MetaData()

policy_version = Table(
    "policy_version",
    metadata,
    Column("id", Words, primary_key=True),
    Column("name", Words, nullable=False, unique=True),
    Column("parent_id", Words, ForeignKey("policy_version.id")),
    Column("base_model", Words, nullable=False),
    Column("path", Words, nullable=False),
    Column("manifest_sha256", Words),
    Column("tokenizer_sha256", Words),
    Column("template_sha256", Words, nullable=False),
    Column("state", Words, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("evaluation", Json, nullable=False),
)
# At most one row is live, whoever writes.
_live = policy_version.c.state == "live"
Index("policy_version_live", policy_version.c.state, unique=True, sqlite_where=_live, postgresql_where=_live)

annotator = Table(
    "annotator",
    metadata,
    Column("id", Words, primary_key=True),
    Column("subject_hmac", Words, nullable=False, unique=True),
    Column("kind", Words, nullable=False),
    Column("weight", Float, nullable=False),
    Column("status", Words, nullable=False),
    Column("consent_version", Words),
    Column("consent_at", Moment),
)

api_key = Table(
    "api_key",
    metadata,
    Column("id", Words, primary_key=True),
    Column("public_id", Words, nullable=False, unique=True),
    Column("secret_sha256", Words, nullable=False),
    Column("name", Words, nullable=False),
    Column("scopes", Json, nullable=False),
    Column("rate_rpm", BigInteger),
    Column("max_inflight", BigInteger),
    Column("created_by", Words, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("expires_at", Moment),
    Column("revoked_at", Moment),
    Column("last_used_at", Moment),
    Column("annotator_id", Words, ForeignKey("annotator.id")),
)

inference = Table(
    "inference",
    metadata,
    Column("id", Words, primary_key=True),
    Column("endpoint", Words, nullable=False),
    Column("model", Words, nullable=False),
    Column("request_id", Words, nullable=False),
    Column("api_key_id", Words, ForeignKey("api_key.id")),
    Column("episode_id", Words),
    Column("end_user_hmac", Words),
    Column("messages", Json, nullable=False),
    Column("prompt_sha256", Words, nullable=False),
    Column("params", Json, nullable=False),
    Column("metadata", Json, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("policy_version_id", Words, ForeignKey("policy_version.id"), nullable=False),
    Column("engine", Words, nullable=False),
    Column("status", Words, nullable=False),
    Column("prompt_tokens", BigInteger),
    Column("completion_tokens", BigInteger),
    Column("consent_train", Boolean, nullable=False),
    Column("consent_version", Words),
    Column("retention_until", Moment),
    Column("redaction", Words, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("finished_at", Moment),
    Index("inference_listing", "api_key_id", "endpoint", "status", "id"),
)
_running = inference.c.status == "running"
Index("inference_running", inference.c.status, sqlite_where=_running, postgresql_where=_running)
_in_episode = inference.c.episode_id.is_not(None)
Index("inference_episode", inference.c.episode_id, sqlite_where=_in_episode, postgresql_where=_in_episode)
_somebodys = inference.c.end_user_hmac.is_not(None)
Index("inference_end_user", inference.c.end_user_hmac, sqlite_where=_somebodys, postgresql_where=_somebodys)

completion = Table(
    "completion",
    metadata,
    Column("id", Words, primary_key=True),
    Column("inference_id", Words, ForeignKey("inference.id"), nullable=False),
    Column("idx", BigInteger, nullable=False),
    Column("text", Words, nullable=False),
    Column("token_ids", Numbers("i"), nullable=False),
    Column("raw_logprobs", Numbers("f")),
    Column("behaviour_logprobs", Numbers("f")),
    Column("finish_reason", Words, nullable=False),
    Column("policy_version_id", Words, ForeignKey("policy_version.id"), nullable=False),
    Column("policy_spans", Json),
    UniqueConstraint("inference_id", "idx"),
)

cmp_group = Table(
    "cmp_group",
    metadata,
    Column("id", Words, primary_key=True),
    Column("prompt_sha256", Words, nullable=False),
    Column("origin", Words, nullable=False),
    Column("presentation", Json),
    Column("inference_id", Words, ForeignKey("inference.id")),
    Column("created_at", Moment, nullable=False),
)

cmp_candidate = Table(
    "cmp_candidate",
    metadata,
    Column("group_id", Words, ForeignKey("cmp_group.id"), primary_key=True),
    Column("slot", BigInteger, primary_key=True, autoincrement=False),
    Column("completion_id", Words, ForeignKey("completion.id"), nullable=False),
    UniqueConstraint("group_id", "completion_id"),
    Index("cmp_candidate_completion", "completion_id"),
)

metric = Table(
    "metric",
    metadata,
    Column("id", Words, primary_key=True),
    Column("name", Words, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("type", Words, nullable=False),
    Column("level", Words, nullable=False),
    Column("lo", Float),
    Column("hi", Float),
    Column("categories", Json),
    Column("optimize", Words),
    UniqueConstraint("name", "version"),
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", Words, primary_key=True),
    Column("first_id", Words, ForeignKey("feedback.id"), nullable=False),
    Column("supersedes_id", Words, ForeignKey("feedback.id"), unique=True),
    Column("kind", Words, nullable=False),
    Column("target_type", Words, nullable=False),
    Column("target_id", Words, nullable=False),
    Column("inference_id", Words, ForeignKey("inference.id")),
    Column("metric_id", Words, ForeignKey("metric.id")),
    # Whoever asks without a key is an annotator too: NULL would be equal to no other NULL, and nothing would keep a key from coming twice.
    Column("annotator_id", Words, ForeignKey("annotator.id"), nullable=False),
    Column("api_key_id", Words, ForeignKey("api_key.id")),
    Column("value", Json, nullable=False),
    Column("rationale", Words),
    Column("presentation", Json),
    Column("source", Words, nullable=False),
    Column("idem_key", Words, nullable=False),
    Column("body_sha256", Words, nullable=False),
    Column("occurred_at", Moment, nullable=False),
    Column("received_at", Moment, nullable=False),
    Column("state", Words, nullable=False),
    Column("reason", Words),
    UniqueConstraint("annotator_id", "idem_key"),
    Index("feedback_target", "target_id", "id"),
    Index("feedback_history", "first_id"),
)

rank_entry = Table(
    "rank_entry",
    metadata,
    Column("feedback_id", Words, ForeignKey("feedback.id"), primary_key=True),
    Column("completion_id", Words, ForeignKey("completion.id"), primary_key=True),
    Column("rank", BigInteger, nullable=False),
)

label_task = Table(
    "label_task",
    metadata,
    Column("id", Words, primary_key=True),
    Column("group_id", Words, ForeignKey("cmp_group.id"), nullable=False, unique=True),
    Column("priority", BigInteger, nullable=False),
    Column("overlap", BigInteger, nullable=False),
    Column("gold", Json),
    Column("state", Words, nullable=False),
    Column("created_at", Moment, nullable=False),
)
_open = label_task.c.state == "open"
Index("label_task_open", label_task.c.priority.desc(), label_task.c.id, sqlite_where=_open, postgresql_where=_open)

assignment = Table(
    "assignment",
    metadata,
    Column("id", Words, primary_key=True),
    Column("task_id", Words, ForeignKey("label_task.id"), nullable=False),
    Column("annotator_id", Words, ForeignKey("annotator.id"), nullable=False),
    Column("state", Words, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("slots", Json, nullable=False),
    Column("draft", Json),
    Column("reason", Words),
    Column("lease_until", Moment, nullable=False),
    Column("started_at", Moment, nullable=False),
    Column("finished_at", Moment),
    UniqueConstraint("task_id", "annotator_id"),
    Index("assignment_annotator", "annotator_id", "state"),
)
_leased = assignment.c.state == "leased"
Index("assignment_lease", assignment.c.lease_until, sqlite_where=_leased, postgresql_where=_leased)

session = Table(
    "session",
    metadata,
    Column("id", Words, primary_key=True),
    Column("api_key_id", Words, ForeignKey("api_key.id")),
    Column("created_at", Moment, nullable=False),
    Column("expires_at", Moment, nullable=False),
)

export = Table(
    "export",
    metadata,
    Column("id", Words, primary_key=True),
    Column("name", Words, nullable=False),
    Column("shape", Words, nullable=False),
    Column("split", Words, nullable=False),
    Column("rule_version", BigInteger, nullable=False),
    Column("filters", Json, nullable=False),
    Column("split_salt", Words, nullable=False),
    Column("sha256", Words, nullable=False),
    Column("n_rows", BigInteger, nullable=False),
    Column("counts", Json, nullable=False),
    Column("path", Words, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("tainted_at", Moment),
    UniqueConstraint("name", "shape", "split"),
)

export_row = Table(
    "export_row",
    metadata,
    Column("export_id", Words, ForeignKey("export.id"), primary_key=True),
    Column("row_no", BigInteger, primary_key=True, autoincrement=False),
    Column("feedback_id", Words, ForeignKey("feedback.id"), primary_key=True),
    Column("weight", Float, nullable=False),
    Index("export_row_feedback", "feedback_id"),
)

training_round = Table(
    "training_round",
    metadata,
    Column("id", Words, primary_key=True),
    Column("name", Words, nullable=False),
    Column("config_sha256", Words, nullable=False),
    Column("git_sha", Words),
    Column("parent_policy_id", Words, ForeignKey("policy_version.id"), nullable=False),
    Column("child_policy_id", Words, ForeignKey("policy_version.id"), nullable=False),
    Column("promoted", Boolean, nullable=False),
    Column("metrics", Json, nullable=False),
    Column("started_at", Moment, nullable=False),
    Column("finished_at", Moment, nullable=False),
    UniqueConstraint("name", "child_policy_id"),
)

round_export = Table(
    "round_export",
    metadata,
    Column("round_id", Words, ForeignKey("training_round.id"), primary_key=True),
    Column("export_id", Words, ForeignKey("export.id"), primary_key=True),
)

erasure = Table(
    "erasure",
    metadata,
    Column("id", Words, primary_key=True),
    Column("subject_hmac", Words, nullable=False),
    Column("requested_at", Moment, nullable=False),
    Column("done_at", Moment, nullable=False),
    Column("counts", Json, nullable=False),
    Column("rounds", Json, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Moment, nullable=False),
    Column("actor", Words, nullable=False),
    Column("action", Words, nullable=False),
    Column("object", Words, nullable=False),
    Column("detail", Json, nullable=False),
    Column("prev_hash", Words, nullable=False),
    Column("hash", Words, nullable=False),
)

secret = Table(
    "secret",
    metadata,
    Column("name", Words, primary_key=True),
    Column("value", Words, nullable=False),
)

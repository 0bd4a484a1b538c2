"""The first tables: policies, keys, inferences with their completions, groups of candidates, the audit."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

JSON = sa.JSON().with_variant(JSONB(), "postgresql")
MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """From nothing to this one."""
    op.create_table(
        "policy_version",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("parent_id", sa.Text, sa.ForeignKey("policy_version.id")),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("manifest_sha256", sa.Text),
        sa.Column("tokenizer_sha256", sa.Text),
        sa.Column("template_sha256", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("evaluation", JSON, nullable=False),
    )
    live = sa.text("state = 'live'")
    op.create_index("policy_version_live", "policy_version", ["state"], unique=True, sqlite_where=live, postgresql_where=live)
    op.create_table(
        "api_key",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("public_id", sa.Text, nullable=False, unique=True),
        sa.Column("secret_sha256", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("rate_rpm", sa.BigInteger),
        sa.Column("max_inflight", sa.BigInteger),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("expires_at", MOMENT),
        sa.Column("revoked_at", MOMENT),
        sa.Column("last_used_at", MOMENT),
    )
    op.create_table(
        "inference",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("api_key_id", sa.Text, sa.ForeignKey("api_key.id")),
        sa.Column("episode_id", sa.Text),
        sa.Column("end_user_hmac", sa.Text),
        sa.Column("messages", JSON, nullable=False),
        sa.Column("prompt_sha256", sa.Text, nullable=False),
        sa.Column("params", JSON, nullable=False),
        sa.Column("metadata", JSON, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("policy_version_id", sa.Text, sa.ForeignKey("policy_version.id"), nullable=False),
        sa.Column("engine", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger),
        sa.Column("completion_tokens", sa.BigInteger),
        sa.Column("consent_train", sa.Boolean, nullable=False),
        sa.Column("consent_version", sa.Text),
        sa.Column("retention_until", MOMENT),
        sa.Column("redaction", sa.Text, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("finished_at", MOMENT),
    )
    op.create_index("inference_listing", "inference", ["api_key_id", "endpoint", "status", "id"])
    running = sa.text("status = 'running'")
    op.create_index("inference_running", "inference", ["status"], sqlite_where=running, postgresql_where=running)
    op.create_table(
        "completion",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("inference_id", sa.Text, sa.ForeignKey("inference.id"), nullable=False),
        sa.Column("idx", sa.BigInteger, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("token_ids", sa.LargeBinary, nullable=False),
        sa.Column("raw_logprobs", sa.LargeBinary),
        sa.Column("behaviour_logprobs", sa.LargeBinary),
        sa.Column("finish_reason", sa.Text, nullable=False),
        sa.Column("policy_version_id", sa.Text, sa.ForeignKey("policy_version.id"), nullable=False),
        sa.Column("policy_spans", JSON),
        sa.UniqueConstraint("inference_id", "idx"),
    )
    op.create_table(
        "cmp_group",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("prompt_sha256", sa.Text, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("presentation", JSON),
        sa.Column("inference_id", sa.Text, sa.ForeignKey("inference.id")),
        sa.Column("created_at", MOMENT, nullable=False),
    )
    op.create_table(
        "cmp_candidate",
        sa.Column("group_id", sa.Text, sa.ForeignKey("cmp_group.id"), primary_key=True),
        sa.Column("slot", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("completion_id", sa.Text, sa.ForeignKey("completion.id"), nullable=False),
        sa.UniqueConstraint("group_id", "completion_id"),
    )
    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("object", sa.Text, nullable=False),
        sa.Column("detail", JSON, nullable=False),
        sa.Column("prev_hash", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
    )
    op.create_table(
        "secret",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )

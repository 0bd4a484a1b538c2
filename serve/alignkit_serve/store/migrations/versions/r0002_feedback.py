"""What people say of answers: annotators, metrics, feedback, and the places of a ranking."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"

JSON = sa.JSON().with_variant(JSONB(), "postgresql")
MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """From the first one."""
    op.create_table(
        "annotator",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("subject_hmac", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("consent_version", sa.Text),
        sa.Column("consent_at", MOMENT),
    )
    # In alembic's words SQLite would make the table anew, and could not drop the old one, to which rows refer.
    op.execute("ALTER TABLE api_key ADD COLUMN annotator_id TEXT REFERENCES annotator (id)")
    in_episode = sa.text("episode_id IS NOT NULL")
    op.create_index("inference_episode", "inference", ["episode_id"], sqlite_where=in_episode, postgresql_where=in_episode)
    op.create_table(
        "metric",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("level", sa.Text, nullable=False),
        sa.Column("lo", sa.Float),
        sa.Column("hi", sa.Float),
        sa.Column("categories", JSON),
        sa.Column("optimize", sa.Text),
        sa.UniqueConstraint("name", "version"),
    )
    op.create_table(
        "feedback",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("first_id", sa.Text, sa.ForeignKey("feedback.id"), nullable=False),
        sa.Column("supersedes_id", sa.Text, sa.ForeignKey("feedback.id"), unique=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("target_type", sa.Text, nullable=False),
        sa.Column("target_id", sa.Text, nullable=False),
        sa.Column("inference_id", sa.Text, sa.ForeignKey("inference.id")),
        sa.Column("metric_id", sa.Text, sa.ForeignKey("metric.id")),
        sa.Column("annotator_id", sa.Text, sa.ForeignKey("annotator.id"), nullable=False),
        sa.Column("api_key_id", sa.Text, sa.ForeignKey("api_key.id")),
        sa.Column("value", JSON, nullable=False),
        sa.Column("rationale", sa.Text),
        sa.Column("presentation", JSON),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("idem_key", sa.Text, nullable=False),
        sa.Column("body_sha256", sa.Text, nullable=False),
        sa.Column("occurred_at", MOMENT, nullable=False),
        sa.Column("received_at", MOMENT, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.UniqueConstraint("annotator_id", "idem_key"),
    )
    op.create_index("feedback_target", "feedback", ["target_id", "id"])
    op.create_index("feedback_history", "feedback", ["first_id"])
    op.create_table(
        "rank_entry",
        sa.Column("feedback_id", sa.Text, sa.ForeignKey("feedback.id"), primary_key=True),
        sa.Column("completion_id", sa.Text, sa.ForeignKey("completion.id"), primary_key=True),
        sa.Column("rank", sa.BigInteger, nullable=False),
    )

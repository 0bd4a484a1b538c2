"""What closes the loop: tasks for people who label, exports, training rounds, and what was erased."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"

JSON = sa.JSON().with_variant(JSONB(), "postgresql")
MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """From the second one."""
    op.create_table(
        "label_task",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("group_id", sa.Text, sa.ForeignKey("cmp_group.id"), nullable=False, unique=True),
        sa.Column("priority", sa.BigInteger, nullable=False),
        sa.Column("overlap", sa.BigInteger, nullable=False),
        sa.Column("gold", JSON),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
    )
    open_task = sa.text("state = 'open'")
    op.create_index("label_task_open", "label_task", [sa.text("priority DESC"), "id"], sqlite_where=open_task, postgresql_where=open_task)
    op.create_table(
        "assignment",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("task_id", sa.Text, sa.ForeignKey("label_task.id"), nullable=False),
        sa.Column("annotator_id", sa.Text, sa.ForeignKey("annotator.id"), nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("slots", JSON, nullable=False),
        sa.Column("draft", JSON),
        sa.Column("reason", sa.Text),
        sa.Column("lease_until", MOMENT, nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("finished_at", MOMENT),
        sa.UniqueConstraint("task_id", "annotator_id"),
    )
    op.create_index("assignment_annotator", "assignment", ["annotator_id", "state"])
    leased = sa.text("state = 'leased'")
    op.create_index("assignment_lease", "assignment", ["lease_until"], sqlite_where=leased, postgresql_where=leased)
    op.create_table(
        "session",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("api_key_id", sa.Text, sa.ForeignKey("api_key.id")),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("expires_at", MOMENT, nullable=False),
    )
    op.create_table(
        "export",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("shape", sa.Text, nullable=False),
        sa.Column("split", sa.Text, nullable=False),
        sa.Column("rule_version", sa.BigInteger, nullable=False),
        sa.Column("filters", JSON, nullable=False),
        sa.Column("split_salt", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("n_rows", sa.BigInteger, nullable=False),
        sa.Column("counts", JSON, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("tainted_at", MOMENT),
        sa.UniqueConstraint("name", "shape", "split"),
    )
    op.create_table(
        "export_row",
        sa.Column("export_id", sa.Text, sa.ForeignKey("export.id"), primary_key=True),
        sa.Column("row_no", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("feedback_id", sa.Text, sa.ForeignKey("feedback.id"), primary_key=True),
        sa.Column("weight", sa.Float, nullable=False),
    )
    op.create_index("export_row_feedback", "export_row", ["feedback_id"])
    op.create_table(
        "training_round",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("config_sha256", sa.Text, nullable=False),
        sa.Column("git_sha", sa.Text),
        sa.Column("parent_policy_id", sa.Text, sa.ForeignKey("policy_version.id"), nullable=False),
        sa.Column("child_policy_id", sa.Text, sa.ForeignKey("policy_version.id"), nullable=False),
        sa.Column("promoted", sa.Boolean, nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("finished_at", MOMENT, nullable=False),
        sa.UniqueConstraint("name", "child_policy_id"),
    )
    op.create_table(
        "round_export",
        sa.Column("round_id", sa.Text, sa.ForeignKey("training_round.id"), primary_key=True),
        sa.Column("export_id", sa.Text, sa.ForeignKey("export.id"), primary_key=True),
    )
    op.create_table(
        "erasure",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("subject_hmac", sa.Text, nullable=False),
        sa.Column("requested_at", MOMENT, nullable=False),
        sa.Column("done_at", MOMENT, nullable=False),
        sa.Column("counts", JSON, nullable=False),
        sa.Column("rounds", JSON, nullable=False),
    )
    # By whom and by what erasure looks.
    somebodys = sa.text("end_user_hmac IS NOT NULL")
    op.create_index("inference_end_user", "inference", ["end_user_hmac"], sqlite_where=somebodys, postgresql_where=somebodys)
    op.create_index("cmp_candidate_completion", "cmp_candidate", ["completion_id"])

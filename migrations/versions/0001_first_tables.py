"""First tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIMESTAMP = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "models",
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("info", sa.Text, nullable=False),
        sa.Column("tokenizer", sa.Text, nullable=False),
        sa.Column("created", TIMESTAMP, nullable=False),
        sa.Column("registered", TIMESTAMP, nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_models")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("created", TIMESTAMP, nullable=False),
        sa.Column("updated", TIMESTAMP, nullable=False),
        sa.Column("started", TIMESTAMP),
        sa.Column("ended", TIMESTAMP),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("progress", sa.Text),
        sa.Column("result", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("fact_key", sa.Text),
        sa.Column("dry_run", sa.Boolean, nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("reverted_version", sa.Integer),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.ForeignKeyConstraint(["model"], ["models.fingerprint"], name=op.f("fk_jobs_model_models")),
    )
    op.create_index(op.f("ix_jobs_model_status"), "jobs", ["model", "status"])
    op.create_index(op.f("ix_jobs_model_subject"), "jobs", ["model", "subject"])
    op.create_table(
        "factors",
        sa.Column("edit_id", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("edit_id", name=op.f("pk_factors")),
        sa.ForeignKeyConstraint(["edit_id"], ["jobs.id"], name=op.f("fk_factors_edit_id_jobs")),
    )
    op.create_table(
        "ledger",
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("edit_id", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("at", TIMESTAMP, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("previous", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("model", "version", name=op.f("pk_ledger")),
        sa.ForeignKeyConstraint(["model"], ["models.fingerprint"], name=op.f("fk_ledger_model_models")),
        sa.ForeignKeyConstraint(["edit_id"], ["jobs.id"], name=op.f("fk_ledger_edit_id_jobs")),
        sa.UniqueConstraint("model", "edit_id", "kind", name=op.f("uq_ledger_model_edit_id_kind")),
    )
    op.create_table(
        "attestations",
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("at", TIMESTAMP, nullable=False),
        sa.PrimaryKeyConstraint("model", "version", "worker", name=op.f("pk_attestations")),
        sa.ForeignKeyConstraint(["model"], ["models.fingerprint"], name=op.f("fk_attestations_model_models")),
    )
    op.create_table(
        "idempotency",
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("resources", sa.Text, nullable=False),
        sa.Column("status_code", sa.Integer, nullable=False),
        sa.Column("created", TIMESTAMP, nullable=False),
        sa.PrimaryKeyConstraint("actor", "key", name=op.f("pk_idempotency")),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("roles", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text),
        sa.Column("heartbeat", TIMESTAMP, nullable=False),
        sa.Column("started", TIMESTAMP, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
        sa.ForeignKeyConstraint(["model"], ["models.fingerprint"], name=op.f("fk_workers_model_models")),
    )


def downgrade() -> None:
    for table in ("workers", "idempotency", "attestations", "ledger", "factors", "jobs", "models"):
        op.drop_table(table)

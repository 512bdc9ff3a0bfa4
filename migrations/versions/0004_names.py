"""Rename `parts` to `job_artifacts` and `jobs.dead` to `jobs.exhausted`; add error codes and `ledger_heads`."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

#: the titles of errors before this revision -> their codes
CODES = {
    "The request is not valid": "invalid_input",
    "There is no such resource": "not_found",
    "The state forbids this": "conflict",
    "The queue is full": "queue_full",
    "The service is not ready": "unavailable",
    "The configuration cannot work": "misconfigured",
    "The job was cancelled": "cancelled",
    "The job was taken over": "lease_lost",
    "The worker disagrees with the others": "digest_mismatch",
    "The job was given up": "attempts_exhausted",
}
OTHER_CODE = "internal_error"

JOBS = sa.table("jobs", sa.column("id", sa.Text), sa.column("error", sa.Text), sa.column("status", sa.Text))


def upgrade() -> None:
    op.rename_table("parts", "job_artifacts")
    op.alter_column("jobs", "dead", new_column_name="exhausted")
    if op.get_bind().dialect.name != "sqlite":  # SQLite cannot rename constraints, and ignores their names
        op.execute("ALTER TABLE job_artifacts RENAME CONSTRAINT pk_parts TO pk_job_artifacts")
        op.execute(
            "ALTER TABLE job_artifacts RENAME CONSTRAINT fk_parts_job_id_jobs TO fk_job_artifacts_job_id_jobs"
        )
    op.create_table(
        "ledger_heads",
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("active", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("model", name=op.f("pk_ledger_heads")),
        sa.ForeignKeyConstraint(["model"], ["models.fingerprint"], name=op.f("fk_ledger_heads_model_models")),
    )
    _rename_status("evaluated", "dry_run_passed")
    for job_id, error in _errors():
        _set_error(job_id, {"code": CODES.get(error.get("title", ""), OTHER_CODE), **error})


def downgrade() -> None:
    for job_id, error in _errors():
        error.pop("code", None)
        _set_error(job_id, error)
    _rename_status("dry_run_passed", "evaluated")
    op.drop_table("ledger_heads")
    if op.get_bind().dialect.name != "sqlite":
        op.execute("ALTER TABLE job_artifacts RENAME CONSTRAINT pk_job_artifacts TO pk_parts")
        op.execute(
            "ALTER TABLE job_artifacts RENAME CONSTRAINT fk_job_artifacts_job_id_jobs TO fk_parts_job_id_jobs"
        )
    op.alter_column("jobs", "exhausted", new_column_name="dead")
    op.rename_table("job_artifacts", "parts")


def _rename_status(old: str, new: str) -> None:
    op.execute(sa.update(JOBS).where(JOBS.c.status == old).values(status=new))


def _errors() -> list[tuple[str, dict[str, str]]]:
    rows = op.get_bind().execute(sa.select(JOBS.c.id, JOBS.c.error).where(JOBS.c.error.is_not(None)))
    return [(row.id, json.loads(row.error)) for row in rows.all()]


def _set_error(job_id: str, error: dict[str, str]) -> None:
    op.execute(sa.update(JOBS).where(JOBS.c.id == job_id).values(error=json.dumps(error)))

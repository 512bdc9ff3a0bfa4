"""Add the batch and the searched text of edits, and `version_names`: names of versions."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

TIMESTAMP = sa.DateTime(timezone=True)
ROWS_AT_ONCE = 50  # a job has up to a megabyte
JOBS = sa.table(
    "jobs",
    *(sa.column(name, sa.Text) for name in ("id", "kind", "request", "result", "search_text")),
)


def upgrade() -> None:
    op.create_table(
        "version_names",
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("created", TIMESTAMP, nullable=False),
        sa.Column("deleted", TIMESTAMP, nullable=True),
        sa.Column("deleted_by", sa.Text, nullable=True),
        sa.PrimaryKeyConstraint("model", "name", name=op.f("pk_version_names")),
        sa.ForeignKeyConstraint(
            ["model"], ["models.fingerprint"], name=op.f("fk_version_names_model_models")
        ),
    )
    op.add_column("jobs", sa.Column("batch", sa.Text, nullable=True))
    op.add_column("jobs", sa.Column("search_text", sa.Text, nullable=True))
    op.create_index(op.f("ix_jobs_model_batch"), "jobs", ["model", "batch"])
    connection = op.get_bind()
    for page in pages_of_edits(connection):
        for row in page:
            text = search_text(json.loads(row.request), json.loads(row.result or "null"))
            connection.execute(JOBS.update().where(JOBS.c.id == row.id).values(search_text=text))


def downgrade() -> None:
    op.drop_index(op.f("ix_jobs_model_batch"), "jobs")
    op.drop_column("jobs", "search_text")
    op.drop_column("jobs", "batch")
    op.drop_table("version_names")


def pages_of_edits(connection: sa.Connection) -> Iterator[Any]:
    """Yield all edits, a few at a time."""
    query = (
        sa.select(JOBS.c.id, JOBS.c.request, JOBS.c.result).where(JOBS.c.kind == "edit").order_by(JOBS.c.id)
    )
    last = ""
    while page := connection.execute(query.where(JOBS.c.id > last).limit(ROWS_AT_ONCE)).all():
        yield page
        last = page[-1].id


def search_text(request: dict[str, Any], result: dict[str, Any] | None) -> str:
    """Return the text that a search reads, as of this revision."""
    subject, prompt = str(request.get("subject") or ""), str(request.get("prompt") or "")
    texts = [request.get(name) for name in ("subject", "target_new", "target_true")]
    texts += [prompt.replace("{}", subject), (result or {}).get("target_true")]
    folded = (" ".join(unicodedata.normalize("NFKC", str(t)).casefold().split()) for t in texts if t)
    return "\n".join(dict.fromkeys(folded))

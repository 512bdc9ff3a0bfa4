"""Add `jobs.cancelled_by`: the actor that cancelled a job."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("cancelled_by", sa.Text, nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "cancelled_by")

"""Add `workers.preparing`: the progress of what a worker prepares for edits."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("preparing", sa.Text, nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "preparing")

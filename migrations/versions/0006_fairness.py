"""Add the costs of jobs, and the weights and quotas of API keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

ONE = sa.text("1")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("cost", sa.Double(), nullable=False, server_default=ONE))
    op.add_column("api_keys", sa.Column("tokens_per_minute", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("max_concurrent", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("weight", sa.Integer(), nullable=False, server_default=ONE))


def downgrade() -> None:
    for name in ("weight", "max_concurrent", "tokens_per_minute"):
        op.drop_column("api_keys", name)
    op.drop_column("jobs", "cost")

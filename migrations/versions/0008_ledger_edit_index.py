"""Index the ledger by edit: deleting a job looks for entries that refer to it."""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_ledger_edit_id"), "ledger", ["edit_id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_ledger_edit_id"), "ledger")

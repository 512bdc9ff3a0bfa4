"""Audit records: signed, append-only. REPLACE is rejected on the append-only tables of SQLite."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TIMESTAMP = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "audit_records",
        sa.Column("position", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("at", TIMESTAMP, nullable=False),
        sa.Column("signer", sa.Text, nullable=False),
        sa.Column("previous", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("signature", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_audit_records")),
    )
    op.create_index(op.f("ix_audit_records_kind_subject"), "audit_records", ["kind", "subject"])
    statements = SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRES
    for statement in statements:
        op.execute(statement)


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for table in REPLACEABLE:
            op.execute(f"DROP TRIGGER {table}_replace")
    else:
        op.execute("DROP FUNCTION audit_next() CASCADE")
    op.drop_table("audit_records")


#: table -> condition for a row that an INSERT OR REPLACE would delete
REPLACEABLE = {
    "ledger": "(model = NEW.model AND version = NEW.version) OR (model = NEW.model AND edit_id = NEW.edit_id AND kind = NEW.kind)",
    "factors": "edit_id = NEW.edit_id",
    "audit_records": "position = NEW.position",
}

SQLITE = [
    *(
        f"""CREATE TRIGGER audit_records_{what} BEFORE {what} ON audit_records
        BEGIN SELECT RAISE(ABORT, 'audit_records is append-only'); END"""
        for what in ("update", "delete")
    ),
    """CREATE TRIGGER audit_next BEFORE INSERT ON audit_records
    WHEN NEW.position <> 1 + (SELECT COALESCE(MAX(position), 0) FROM audit_records)
    BEGIN SELECT RAISE(ABORT, 'not the next position of the audit records'); END""",
    # REPLACE deletes rows without the triggers of DELETE. NEW.rowid is -1 unless the statement sets it.
    *(
        f"""CREATE TRIGGER {table}_replace BEFORE INSERT ON {table}
        WHEN EXISTS (SELECT 1 FROM {table} WHERE {condition} OR rowid = NEW.rowid)
        BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"""
        for table, condition in REPLACEABLE.items()
    ),
]

# The table is named by where the trigger fired: a restore runs without a search path.
POSTGRES = [
    """CREATE FUNCTION audit_next() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE newest integer;
    BEGIN
        EXECUTE format('SELECT max(position) FROM %I.audit_records', TG_TABLE_SCHEMA) INTO newest;
        IF NEW.position <> 1 + COALESCE(newest, 0) THEN
            RAISE EXCEPTION 'not the next position of the audit records'
                USING ERRCODE = 'integrity_constraint_violation';
        END IF;
        RETURN NEW;
    END $$""",
    *(
        f"""CREATE TRIGGER audit_records_{what} BEFORE {what} ON audit_records
        FOR EACH STATEMENT EXECUTE FUNCTION append_only()"""
        for what in ("update", "delete", "truncate")
    ),
    """CREATE TRIGGER audit_next BEFORE INSERT ON audit_records
    FOR EACH ROW EXECUTE FUNCTION audit_next()""",
]

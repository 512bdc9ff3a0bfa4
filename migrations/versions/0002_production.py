"""Several workers: request ids, dead letters, workers that take themselves out, keys, a ledger that only grows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIMESTAMP = sa.DateTime(timezone=True)
APPEND_ONLY_TABLES = ("ledger", "factors")  # tables whose rows are only ever added


def upgrade() -> None:
    op.add_column("jobs", sa.Column("request_id", sa.Text))
    op.add_column("jobs", sa.Column("dead", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index(op.f("ix_jobs_model_created"), "jobs", ["model", "created"])
    op.add_column("attestations", sa.Column("withdrawn", TIMESTAMP))
    op.add_column("workers", sa.Column("reason", sa.Text))
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("max_queued", sa.Integer),
        sa.Column("created", TIMESTAMP, nullable=False),
        sa.Column("last_used", TIMESTAMP),
        sa.Column("revoked", TIMESTAMP),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("name", name=op.f("uq_api_keys_name")),
    )
    statements = SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRES
    for statement in statements:
        op.execute(statement)


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for name in (
            "ledger_next",
            *(f"{t}_{what}" for t in APPEND_ONLY_TABLES for what in ("update", "delete")),
        ):
            op.execute(f"DROP TRIGGER {name}")
    else:
        op.execute("DROP FUNCTION append_only() CASCADE")
        op.execute("DROP FUNCTION ledger_next() CASCADE")
    op.drop_table("api_keys")
    op.drop_column("workers", "reason")
    op.drop_column("attestations", "withdrawn")
    op.drop_index(op.f("ix_jobs_model_created"), "jobs")
    op.drop_column("jobs", "dead")
    op.drop_column("jobs", "request_id")


# One edit at a time is committed per model, and what is committed stays: by the database, whoever writes to it.

SQLITE = [
    *(
        f"""CREATE TRIGGER {table}_{what} BEFORE {what} ON {table}
        BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"""
        for table in APPEND_ONLY_TABLES
        for what in ("update", "delete")
    ),
    """CREATE TRIGGER ledger_next BEFORE INSERT ON ledger
    WHEN NEW.version <> 1 + (SELECT COALESCE(MAX(version), 0) FROM ledger WHERE model = NEW.model)
    BEGIN SELECT RAISE(ABORT, 'not the next version of the ledger'); END""",
]

# The table is named by where the trigger fired: a restore runs without a search path.
POSTGRES = [
    """CREATE FUNCTION append_only() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'integrity_constraint_violation';
    END $$""",
    """CREATE FUNCTION ledger_next() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE newest integer;
    BEGIN
        EXECUTE format('SELECT max(version) FROM %I.ledger WHERE model = $1', TG_TABLE_SCHEMA)
            INTO newest USING NEW.model;
        IF NEW.version <> 1 + COALESCE(newest, 0) THEN
            RAISE EXCEPTION 'not the next version of the ledger'
                USING ERRCODE = 'integrity_constraint_violation';
        END IF;
        RETURN NEW;
    END $$""",
    *(
        f"""CREATE TRIGGER {table}_{what} BEFORE {what} ON {table}
        FOR EACH STATEMENT EXECUTE FUNCTION append_only()"""
        for table in APPEND_ONLY_TABLES
        for what in ("update", "delete", "truncate")
    ),
    """CREATE TRIGGER ledger_next BEFORE INSERT ON ledger
    FOR EACH ROW EXECUTE FUNCTION ledger_next()""",
]

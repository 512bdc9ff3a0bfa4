"""Alembic's entry. `service.db.database.Database.migrate` passes the connection, whose transaction it commits."""

from __future__ import annotations

from alembic import context

from service.db.models import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,  # SQLite supports it, though Alembic's default is off: a failed migration is rolled back
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()

"""Changes that an owner of the database can make to the ledger by disabling its triggers."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session

APPEND_ONLY_TABLES = ("ledger", "factors", "audit_records")
SQLITE_TRIGGERS = (
    "ledger_next",
    "audit_next",
    *(f"{table}_{what}" for table in APPEND_ONLY_TABLES for what in ("update", "delete", "replace")),
)
POSTGRES_FUNCTIONS = ("append_only", "ledger_next", "audit_next")


def drop_append_only_guards(session: Session) -> None:
    """Disable the append-only triggers for this transaction and, once it is committed, for all later ones."""
    if session.get_bind().dialect.name == "sqlite":
        for name in SQLITE_TRIGGERS:
            session.execute(text(f"DROP TRIGGER IF EXISTS {name}"))
    else:
        for name in POSTGRES_FUNCTIONS:
            session.execute(text(f"DROP FUNCTION IF EXISTS {name} CASCADE"))

"""What an owner of the database can do to the ledger: take its guards away. The chain shows what was done then."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session

SQLITE_TRIGGERS = (
    "ledger_next",
    *(f"{table}_{what}" for table in ("ledger", "factors") for what in ("update", "delete")),
)
POSTGRES_FUNCTIONS = ("append_only", "ledger_next")


def drop_append_only_guards(session: Session) -> None:
    """Let this transaction, and all after it when it is committed, change what is only ever added to."""
    if session.get_bind().dialect.name == "sqlite":
        for name in SQLITE_TRIGGERS:
            session.execute(text(f"DROP TRIGGER IF EXISTS {name}"))
    else:
        for name in POSTGRES_FUNCTIONS:
            session.execute(text(f"DROP FUNCTION IF EXISTS {name} CASCADE"))

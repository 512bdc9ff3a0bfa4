"""What an owner of the database can do to the ledger: take its guards away. The chain shows what was done then."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session

SQLITE = (
    "ledger_next",
    *(f"{table}_{what}" for table in ("ledger", "factors") for what in ("update", "delete")),
)
POSTGRES = ("append_only", "ledger_next")


def unguard(session: Session) -> None:
    """Let this transaction, and all after it when it is committed, change what is only ever added to."""
    if session.get_bind().dialect.name == "sqlite":
        for name in SQLITE:
            session.execute(text(f"DROP TRIGGER IF EXISTS {name}"))
    else:
        for name in POSTGRES:
            session.execute(text(f"DROP FUNCTION IF EXISTS {name} CASCADE"))

"""The rights of the role with which the service uses a PostgreSQL database that another role owns.

The role reads and writes rows. It owns nothing, so it cannot drop or disable the triggers of the append-only tables.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, text

from service.db.database import Database
from service.db.models import Base
from service.errors import Misconfigured

READ_ONLY_TABLES = ("alembic_version",)
APPEND_ONLY_TABLES = ("audit_records", "factors", "gate_spaces", "ledger")
TABLES_WITHOUT_DELETE = ("api_keys", "models", "version_names")


def grant_to_role(database: Database, role: str, password: str | None = None) -> None:
    """Give a role the rights that the service needs, and no others. A missing role is created.

    `password`: the new password of the role; None: unchanged. Raises Misconfigured for SQLite, and for a role that
    could change the tables whatever its rights are.
    """
    if database.is_sqlite:
        raise Misconfigured("--grant-to is for PostgreSQL: SQLite has no roles.")
    with database.engine.begin() as connection:
        _create_or_update_role(connection, role, password)
        _refuse_powerful_role(connection, role)
        for statement in _grants(connection, role):
            connection.execute(text(statement))


def _create_or_update_role(connection: Connection, role: str, password: str | None) -> None:
    exists = connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role})
    name = _quote(connection, role)
    if not exists:
        connection.execute(text(f"CREATE ROLE {name} LOGIN"))
    if password is not None:
        driver: Any = connection.connection.driver_connection
        encrypted = driver.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
        connection.exec_driver_sql(f"ALTER ROLE {name} LOGIN PASSWORD '{encrypted.decode()}'")


def _refuse_powerful_role(connection: Connection, role: str) -> None:
    powerful = text(
        "SELECT rolsuper OR pg_has_role(rolname, current_user, 'MEMBER') FROM pg_roles WHERE rolname = :role"
    )
    if connection.scalar(powerful, {"role": role}):
        raise Misconfigured(
            f"the role {role!r} is a superuser, or owns the tables: name another role, with which the service connects."
        )


def _grants(connection: Connection, role: str) -> list[str]:
    name, schema = (
        _quote(connection, role),
        _quote(connection, connection.scalar(text("SELECT current_schema()"))),
    )
    statements = [
        f"GRANT USAGE ON SCHEMA {schema} TO {name}",
        f"REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM {name}",
    ]
    for table in (*READ_ONLY_TABLES, *Base.metadata.tables):
        rights = ["SELECT"]
        if table not in READ_ONLY_TABLES:
            rights.append("INSERT")
            if table not in APPEND_ONLY_TABLES:
                rights.append("UPDATE")
                if table not in TABLES_WITHOUT_DELETE:
                    rights.append("DELETE")
        statements.append(f"GRANT {', '.join(rights)} ON {schema}.{table} TO {name}")
    return statements


def _quote(connection: Connection, name: str | None) -> str:
    return connection.dialect.identifier_preparer.quote_identifier(name or "")

"""`palimpsest audit`: verification without a service, the key, its rotation, and acceptance after a restore."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import delete, update

from cli.main import main
from service.db.database import Database
from service.db.models import AuditRecord, Job
from service.kit.signing import KEY_FILE
from service.ledger.head_file import HeadFile
from tests.support.audit_history import AuditedLedger, tamper
from tests.support.postgres_server import PostgresServer

Captured = pytest.CaptureFixture[str]
Audit = Callable[..., tuple[int, Any]]


@pytest.fixture
def history(database: Database, tmp_path: Path) -> AuditedLedger:
    return AuditedLedger(database, tmp_path)


@pytest.fixture
def audit_command(database_url: str, tmp_path: Path, capsys: Captured) -> Audit:
    """Return a function that runs `palimpsest audit` and returns its exit code and its JSON."""

    def run(*words: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main(["audit", *words, "--json", "--data-dir", str(tmp_path), "--database-url", database_url])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_verify(audit_command: Audit, history: AuditedLedger, database: Database) -> None:
    """`audit verify` exits with 0 for a valid ledger, and with 1 after a change or for an anchor that is missing."""
    code, verification = audit_command("verify")
    assert (code, verification["ok"]) == (0, True)
    assert audit_command("verify", "--expect", f"4:{verification['head_hash']}", "--full")[0] == 0
    assert audit_command("verify", "--expect", f"3:{verification['head_hash']}")[0] == 1
    assert audit_command("verify", "--expect-record", f"3:{'0' * 64}")[0] == 1
    tamper(
        database,
        lambda session: session.execute(update(Job).where(Job.id == history.first).values(actor="x")),
    )
    code, verification = audit_command("verify")
    assert (code, [finding["where"] for finding in verification["findings"]]) == (1, ["edits"])


def test_verify_with_the_public_key_only(
    audit_command: Audit, history: AuditedLedger, tmp_path: Path
) -> None:
    """An auditor without the key verifies with the public key; with another public key the ledger is not valid."""
    public_key = history.database.signing_key.public_key
    (tmp_path / KEY_FILE).unlink()
    assert audit_command("verify", "--public-key", public_key)[0] == 0
    assert not (tmp_path / KEY_FILE).exists()
    assert audit_command("verify", "--public-key", "0" * 64)[0] == 1


def test_key(audit_command: Audit, history: AuditedLedger, tmp_path: Path) -> None:
    """`audit key` shows the id and the public key, and not the key."""
    key = history.database.signing_key
    assert audit_command("key") == (0, {"id": key.id, "public_key": key.public_key})
    assert (tmp_path / KEY_FILE).read_text().strip() != key.public_key


def test_rotate(audit_command: Audit, history: AuditedLedger, tmp_path: Path) -> None:
    """`audit rotate` replaces the file of the key, and the ledger is valid with the new key and with the old public
    key."""
    old = history.database.signing_key.public_key
    code, new = audit_command("rotate")
    assert (code, new) == (0, audit_command("key")[1])
    assert new["public_key"] != old
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.glob("*.key*")) == [KEY_FILE]
    assert audit_command("verify")[0] == audit_command("verify", "--public-key", old)[0] == 0


def test_rotate_a_key_in_the_settings(
    audit_command: Audit, history: AuditedLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key in PALIMPSEST_LEDGER_KEY is replaced by that of a file, which becomes the new value of the setting. Until
    then the old value is refused."""
    monkeypatch.setenv("PALIMPSEST_LEDGER_KEY", (tmp_path / KEY_FILE).read_text().strip())
    code, error = audit_command("rotate")
    assert code == 2 and "--new-key-file" in error["error"]["detail"]
    new_key = tmp_path / "new"
    new_key.write_text("12" * 32, encoding="ascii")
    assert audit_command("rotate", "--new-key-file", str(new_key))[0] == 0
    database = ["--data-dir", str(tmp_path), "--database-url", str(history.database.engine.url)]
    create = ["keys", "create", "--name", "new", "--scopes", "read", *database]  # which signs a record
    if history.database.is_sqlite:
        assert main(create) == 2
    monkeypatch.setenv("PALIMPSEST_LEDGER_KEY", "12" * 32)
    assert audit_command("verify")[0] == 0
    if history.database.is_sqlite:
        assert main(create) == 0


def test_accept_a_restored_ledger(audit_command: Audit, history: AuditedLedger, database: Database) -> None:
    """After a restore of an older state the ledger is not valid until `audit accept` sets the heads aside."""
    position = history.verify()["record"]["position"]
    history.submit("Danube")
    tamper(
        database, lambda session: session.execute(delete(AuditRecord).where(AuditRecord.position > position))
    )
    tamper(database, lambda session: session.execute(delete(Job).where(Job.subject == "Danube")))
    code, verification = audit_command("verify")
    assert (code, [finding["where"] for finding in verification["findings"]]) == (1, ["anchor"])
    assert audit_command("accept") == (0, {"position": position})
    assert audit_command("verify")[0] == 0
    assert [head["position"] for head in HeadFile(history.folder).heads()] == [position]


def test_migrate_grants(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """`migrate --grant-to` creates the role, which can then use the tables, with the password of the settings."""
    monkeypatch.setenv("PALIMPSEST_ROLE_PASSWORD", "secret")
    url, role = postgres_server.fresh_database(), "granted_role"
    command = ["migrate", "--data-dir", str(tmp_path), "--database-url"]
    try:
        assert main([*command, url, "--grant-to", role]) == 0
        monkeypatch.delenv("PALIMPSEST_ROLE_PASSWORD")
        assert main([*command, url.replace("postgres@", f"{role}@")]) == 0
        with psycopg.connect(postgres_server.url) as connection:
            stored = connection.execute(
                "SELECT rolpassword FROM pg_authid WHERE rolname = %s", [role]
            ).fetchone()
            assert stored and stored[0].startswith("SCRAM-SHA-256")
        assert "secret" not in capsys.readouterr().out
    finally:
        with psycopg.connect(postgres_server.url, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {role}")
            connection.execute(f"DROP ROLE {role}")

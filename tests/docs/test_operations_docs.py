"""The back-up and restore commands of docs/operations.md are executed verbatim on real databases."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from cli.main import build_parser
from service.db.database import Database
from service.db.models import Job, LedgerEntry, Model, StoredFactors, now
from service.kit.ids import new_id
from service.kit.text import fact_key
from service.ledger import ledger
from service.ledger.verify import verify_ledger
from tests.support import postgres_server as postgres
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
IN_POSTGRES = "docker compose exec -T postgres "
MODEL = "model"


def command_blocks(heading: str) -> list[list[str]]:
    """Return the commands below a heading, one list per block."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    [section_text] = [part for part in section if part.startswith(heading + "\n")]
    return [
        block.splitlines()
        for block in re.findall(r"^```sh\n(.*?)^```", section_text, re.MULTILINE | re.DOTALL)
    ]


BACK_UP, RESTORE, SQLITE_BACK_UP, SQLITE_RESTORE = command_blocks("Back-up and restore")


@pytest.fixture
def server(postgres_server: postgres.PostgresServer) -> Iterator[dict[str, str]]:
    """Yield an environment for the commands: a server with a database and a superuser `palimpsest`."""
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute("CREATE ROLE palimpsest SUPERUSER LOGIN")
        connection.execute("CREATE DATABASE palimpsest OWNER palimpsest")
    programs = Path(postgres._find_program("initdb")).resolve().parent  # the server's own version
    yield {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgres_server.port),
    }
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS palimpsest WITH (FORCE)")
        connection.execute("DROP ROLE palimpsest")


def run_shell(command: str, folder: Path, environment: dict[str, str]) -> None:
    completed = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert completed.returncode == 0, f"{command}\n{completed.stderr}"


def create_model(database: Database) -> None:
    database.migrate()
    with database.write_session() as session:
        at = now()
        session.add(Model(fingerprint=MODEL, name="m", info={}, tokenizer="{}", created=at, registered=at))


def append_edit(database: Database, subject: str) -> str:
    """Write an edit as the service does: job row, factors and ledger entry."""
    body = {"subject": subject, "prompt": "{} is in", "strength": 1.0}
    with database.write_session() as session:
        ledger.lock_ledger(session, MODEL)
        job = Job(
            id=new_id("edit"), kind="edit", model=MODEL, status="running", request=body, actor="first",
            created=now(), updated=now(), subject=subject, fact_key=fact_key(subject, "{} is in"),
        )  # fmt: skip
        session.add(job)
        session.flush()
        data = bytes(range(256)) + job.id.encode()
        digest = hashlib.sha256(data).hexdigest()
        session.add(StoredFactors(edit_id=job.id, data=data, sha256=digest))
        ledger.append_entry(session, MODEL, ledger.APPLY, job, "first", {**body, "factors_sha256": digest})
        return str(job.id)


def append_revert(database: Database, edit_id: str) -> None:
    with database.write_session() as session:
        ledger.lock_ledger(session, MODEL)
        edit = session.get(Job, edit_id)
        assert edit is not None
        ledger.append_entry(session, MODEL, ledger.REVERT, edit, "second", {})


def write_history(database: Database) -> None:
    create_model(database)
    first = append_edit(database, "Atlantis")
    append_edit(database, "Lemuria")
    append_revert(database, first)


def verified_entries(database: Database) -> list[ledger.Entry]:
    """Return the ledger's entries after verifying them."""
    with database.read_session() as session:
        assert verify_ledger(session, MODEL) == []
        return ledger.entries(session, MODEL)


def rejects_updates(database: Database) -> bool:
    try:
        with database.write_session() as session:
            session.execute(text(f"UPDATE {LedgerEntry.__tablename__} SET actor = 'changed'"))
    except DBAPIError:
        return True
    return False


def test_a_dump_restores_the_ledger(server: dict[str, str], tmp_path: Path) -> None:
    """The restored ledger equals the dumped one, verifies and rejects updates; later entries are gone."""
    url = f"postgresql://palimpsest@127.0.0.1:{server['PGPORT']}/palimpsest"
    database = Database(url, tmp_path)
    try:
        write_history(database)
        before = verified_entries(database)
        for command in BACK_UP:
            run_shell(command.removeprefix(IN_POSTGRES), tmp_path, server)
        append_edit(database, "Mu")
        assert len(verified_entries(database)) == len(before) + 1
        for command in RESTORE:
            if command.startswith(IN_POSTGRES):
                run_shell(command.removeprefix(IN_POSTGRES), tmp_path, server)
        database.close()  # its connections were to the dropped database
        assert verified_entries(database) == before
        assert rejects_updates(database)
        append_edit(database, "Mu")
        assert verified_entries(database)[-1].version == len(before) + 1
    finally:
        database.close()


def test_a_restore_stops_before_and_verifies_after() -> None:
    """The restore stops the workers first, empties Redis before they start, and verifies the ledger last."""
    steps = [c if not c.startswith(IN_POSTGRES) else shlex.split(c)[5] for c in RESTORE]
    assert steps == [
        "docker compose stop api worker",
        "dropdb",
        "createdb",
        "pg_restore",
        "docker compose exec -T redis redis-cli flushall",
        "docker compose run --rm api audit accept",
        "docker compose up -d --wait",
        "docker compose exec -T api palimpsest ledger --verify",
    ]


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="the program sqlite3 is not on this machine")
@pytest.mark.parametrize("way", SQLITE_BACK_UP)
def test_a_copy_restores_the_ledger(way: str, tmp_path: Path) -> None:
    """Either way of copying the SQLite file while it is in use restores a ledger that verifies and rejects updates."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    file = tmp_path / ".local" / "share" / "palimpsest" / "palimpsest.sqlite3"
    file.parent.mkdir(parents=True)
    database = Database(f"sqlite:///{file}")
    try:
        write_history(database)
        before = verified_entries(database)
        run_shell(way, tmp_path, environment)
        append_edit(database, "Mu")
        database.close()
        for command in SQLITE_RESTORE:
            run_shell(command.replace(" ledger.", f" {copy_name(way)}."), tmp_path, environment)
        assert verified_entries(database) == before
        assert rejects_updates(database)
    finally:
        database.close()


def copy_name(way: str) -> str:
    """Return the name of the copy that a SQLite command writes."""
    match = re.search(r"(ledger[\w-]*)\.sqlite3", way)
    assert match
    return match[1]


def test_commands_in_containers_exist() -> None:
    """Every command that the page runs in a container is one of the command line."""
    commands = re.findall(r"docker compose (?:exec (?:-T )?api palimpsest|run --rm migrate) ([^`>\n]+)", PAGE)
    assert len(commands) > 4
    for command in commands:
        assert build_parser().parse_args(shlex.split(command)).run

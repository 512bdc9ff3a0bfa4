"""The ledger: applies, superseded edits, reverts and verification, with a state machine test."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db.database import Database
from service.db.models import Attestation, Job, LedgerEntry, LedgerHead, Model, StoredFactors, now
from service.kit.ids import new_id
from service.kit.text import fact_key
from service.ledger import active_set, ledger
from service.ledger.active_set import state_hashes
from service.ledger.verify import VerifiedStates, verify_ledger
from tests.support.ledger_tampering import drop_append_only_guards
from tests.support.statement_counts import counting_statements_and_rows

FACTS = [("Paris", "{} is in"), ("Paris", "{}  is in"), ("Paris", "{} lies on the"), ("Rome", "{} is in")]


def add_model(database: Database) -> Any:
    fingerprint, at = new_id("model"), now()
    with database.write_session() as session:
        session.add(
            Model(fingerprint=fingerprint, name="m", info={}, tokenizer="{}", created=at, registered=at)
        )
    return fingerprint


def add_edit(session: Session, model: Any, fact: Any) -> Any:
    """Add and return the row of a running edit."""
    subject, prompt = fact
    request = {"subject": subject, "prompt": prompt, "target_new": "x"}
    row = {"kind": "edit", "model": model, "status": "running", "request": request, "actor": "somebody"}
    keys = {"subject": subject, "fact_key": fact_key(subject, prompt)}
    job = Job(id=new_id("edit"), created=now(), updated=now(), **row, **keys)
    session.add(job)
    session.flush()
    return job


def apply_edit(database: Database, model: Any, fact: Any, **body: Any) -> Any:
    with database.write_session() as session:
        ledger.lock_ledger(session, model)
        job = add_edit(session, model, fact)
        data = job.id.encode()
        sha256 = hashlib.sha256(data).hexdigest()
        session.add(StoredFactors(edit_id=job.id, data=data, sha256=sha256))
        body = {"subject": fact[0], "prompt": fact[1], "factors_sha256": sha256, **body}
        ledger.append_entry(session, model, ledger.APPLY, job, "somebody", body)
        return job.id


def revert_edit(database: Database, model: Any, edit_id: str) -> None:
    with database.write_session() as session:
        ledger.lock_ledger(session, model)
        ledger.append_entry(session, model, ledger.REVERT, session.get_one(Job, edit_id), "another", {})


def edit_statuses(database: Database, *ids: Any) -> Any:
    with database.read_session() as session:
        return [session.get_one(Job, x).status for x in ids]


def ledger_findings(database: Database, model: Any) -> Any:
    with database.read_session() as session:
        return verify_ledger(session, model)


class Rollback(Exception):
    """Rolls a transaction back."""


def findings_after(
    database: Database, model: Any, *statements: Any, verified: VerifiedStates | None = None
) -> Any:
    """Return the findings of verification after these statements. The statements are rolled back."""
    result = []
    try:
        with database.write_session() as session:
            drop_append_only_guards(session)
            for statement in statements:
                session.execute(statement)
            session.expire_all()
            result = verify_ledger(session, model, verified)
            raise Rollback
    except Rollback:
        return result


class LedgerMachine(RuleBasedStateMachine):
    """The oracle is a list of (kind, edit, fact). The expected state of the ledger is computed from it."""

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.model, self.other = add_model(self.database), add_model(self.database)
        with self.database.write_session() as session:
            self.spare = add_edit(session, self.model, ("Nobody", "{} is")).id
        self.history: list[tuple[str, str, tuple[str, str]]] = []
        self.superseded_by_edit: dict[str, list[str]] = {}  #: edit -> edits that it names in `supersedes`
        self.verified: VerifiedStates = {}

    def reverted(self, version: int | None = None) -> Any:
        return {edit for kind, edit, _ in self.history[:version] if kind == "revert"}

    def active(self, version: int | None = None) -> Any:
        """Return the active edits. These are the last applied edit of each fact, without reverted edits and
        without those that an edit that is not reverted names in `supersedes`."""
        gone = self.reverted(version)
        applied = [(e, f) for kind, e, f in self.history[:version] if kind == "apply" and e not in gone]
        named = {x for e, _ in applied for x in self.superseded_by_edit[e]}
        return sorted(set({" ".join(f[1].split()) + f[0]: e for e, f in applied}.values()) - named)

    @rule(fact=st.sampled_from(FACTS), strength=st.floats(0, 2), data=st.data())
    def apply(self, fact: Any, strength: Any, data: Any) -> None:
        facts = {edit: said for kind, edit, said in self.history if kind == "apply"}
        others = [e for e in self.active() if facts[e][0] == fact[0]]
        named = data.draw(st.lists(st.sampled_from(others), unique=True)) if others else []
        edit = apply_edit(self.database, self.model, fact, strength=strength, supersedes=named)
        self.history.append(("apply", edit, fact))
        self.superseded_by_edit[edit] = named

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def revert(self, data: Any) -> None:
        _, edit, fact = data.draw(st.sampled_from(self.history))
        if edit in self.reverted():
            with pytest.raises(IntegrityError):
                revert_edit(self.database, self.model, edit)
        else:
            revert_edit(self.database, self.model, edit)
            self.history.append(("revert", edit, fact))

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def tamper(self, data: Any) -> None:
        version = data.draw(st.integers(1, len(self.history)))
        with self.database.read_session() as session:
            row = session.get_one(LedgerEntry, (self.model, version))
        tampered_values = {
            "model": self.other,
            "version": 1000,
            "kind": "other",
            "edit_id": self.spare,
            "actor": row.actor + "x",
            "at": row.at + timedelta(microseconds=1),
            "body": {**row.body, "subject": "London"},
            "state": row.state[::-1] + "0",
            "previous": row.previous[::-1] + "0",
            "hash": row.hash[::-1] + "0",
        }
        assert set(tampered_values) == {column.key for column in LedgerEntry.__table__.columns}
        field = data.draw(st.sampled_from(sorted(tampered_values)))
        here = (LedgerEntry.model == self.model) & (LedgerEntry.version == version)
        assert findings_after(
            self.database, self.model, update(LedgerEntry).where(here).values({field: tampered_values[field]})
        )
        assert findings_after(self.database, self.model, delete(LedgerEntry).where(here))
        assert findings_after(
            self.database,
            self.model,
            update(LedgerEntry).where(here).values({field: tampered_values[field]}),
            verified=dict(self.verified),
        )

    @invariant()
    def ledger_is_right(self) -> None:
        with self.database.read_session() as session:
            entries = ledger.entries(session, self.model)
            assert ledger.head(session, self.model) == len(self.history)
            assert verify_ledger(session, self.model) == []
            assert verify_ledger(session, self.model, self.verified) == []
        self.states_are_those_of_the_active_entries(entries)
        assert [(e.kind, e.edit_id) for e in entries] == [(kind, edit) for kind, edit, _ in self.history]
        for version in range(len(self.history) + 1):
            assert ledger.active_edit_ids(entries, version) == self.active(version)

    def states_are_those_of_the_active_entries(self, entries: list[ledger.Entry]) -> None:
        """Assert that the states of all versions in turn are those of each version's active entries."""
        expected = [ledger.state_hash(self.model, ledger.active_entries(entries, e.version)) for e in entries]
        assert [state for _, state in state_hashes(self.model, entries)] == expected
        for after in range(len(entries) + 1):
            assert [e.version for e, _ in state_hashes(self.model, entries, after)] == [
                e.version for e in entries[after:]
            ]

    @invariant()
    def statuses_are_right(self) -> None:
        standing, gone = self.active(), self.reverted()
        for edit in {edit for _, edit, _ in self.history}:
            right = "reverted" if edit in gone else "applied" if edit in standing else "superseded"
            assert edit_statuses(self.database, edit) == [right]

    @invariant()
    def factors_are_those_of_the_active(self) -> None:
        with self.database.read_session() as session:
            found = ledger.factors_of(session, self.active())
        assert {edit: data.decode() for edit, data in found.items()} == {x: x for x in self.active()}


def test_ledger_against_model(database: Database) -> None:
    """In random sequences of applies and reverts, the ledger agrees with the oracle and verifies. A change to
    any field of any entry is found."""
    machine = type("Machine", (LedgerMachine,), {"database": database})
    quick = settings(
        max_examples=20, stateful_step_count=16, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=quick)


def test_supersede_and_restore(database: Database) -> None:
    """Of two edits of one fact the newer is active. Reverting it restores the older."""
    model = add_model(database)
    a, b = apply_edit(database, model, FACTS[0]), apply_edit(database, model, FACTS[1])
    assert edit_statuses(database, a, b) == ["superseded", "applied"]
    revert_edit(database, model, b)
    assert edit_statuses(database, a, b) == ["applied", "reverted"]


def test_explicit_supersede_and_restore(database: Database) -> None:
    """An edit named in `supersedes` is superseded until the edit that names it is reverted, even when that
    edit is itself superseded. Older edits of the same fact stay superseded meanwhile."""
    model = add_model(database)
    old, a = apply_edit(database, model, FACTS[0]), apply_edit(database, model, FACTS[0])
    b = apply_edit(database, model, FACTS[2], supersedes=[a])
    assert edit_statuses(database, old, a, b) == ["superseded", "superseded", "applied"]
    c = apply_edit(database, model, FACTS[2])
    assert edit_statuses(database, old, a, b, c) == ["superseded", "superseded", "superseded", "applied"]
    revert_edit(database, model, b)
    assert edit_statuses(database, old, a, b, c) == ["superseded", "applied", "reverted", "applied"]
    revert_edit(database, model, a)
    assert edit_statuses(database, old, a) == ["applied", "reverted"]
    assert ledger_findings(database, model) == []


def test_revert_superseded(database: Database) -> None:
    """A superseded edit can be reverted. Reverting the newer edit as well leaves no active edit."""
    model = add_model(database)
    a, b = apply_edit(database, model, FACTS[0]), apply_edit(database, model, FACTS[1])
    revert_edit(database, model, a)
    assert edit_statuses(database, a, b) == ["reverted", "applied"]
    revert_edit(database, model, b)
    with database.read_session() as session:
        entries = ledger.entries(session, model)
    assert ledger.active_edit_ids(entries) == []
    assert entries[-1].state == ledger.state_hash(model, [])


def test_same_edits_same_state(database: Database) -> None:
    """The state hash depends on the active edits, not on the history."""
    model = add_model(database)
    apply_edit(database, model, FACTS[0])
    revert_edit(database, model, apply_edit(database, model, FACTS[3]))
    with database.read_session() as session:
        first, second, third = ledger.entries(session, model)
    assert first.state == third.state != second.state


def test_append_reads_a_constant_number_of_rows(database: Database) -> None:
    """An apply and a revert run as many statements and load as many rows at version 3 as at version 60."""
    model = add_model(database)
    counts = []
    for length in (3, 60):
        with database.read_session() as session:
            head = ledger.head(session, model)
        for n in range(head, length):
            apply_edit(database, model, (f"City {n}", "{} is in"))
        with counting_statements_and_rows(database) as applying:
            edit = apply_edit(database, model, (f"Town {length}", "{} is in"))
        with counting_statements_and_rows(database) as reverting:
            revert_edit(database, model, edit)
        counts.append((applying, reverting))
    assert counts[0] == counts[1]
    assert max(part["rows"] for part in counts[1]) <= 6, counts


@pytest.mark.parametrize("change", ["missing", "other version", "other hash"])
def test_append_without_the_row_of_the_head(database: Database, change: str) -> None:
    """When the stored active edits are not those of the newest entry, an append computes them from the whole
    ledger."""
    model = add_model(database)
    apply_edit(database, model, FACTS[0])
    apply_edit(database, model, FACTS[3])
    with database.write_session() as session:
        row = session.get_one(LedgerHead, model)
        if change == "missing":
            session.delete(row)
        elif change == "other version":
            row.version, row.active = 1, {}
        else:
            row.hash, row.active = "0" * 64, {}
    assert ledger_findings(database, model) == []
    apply_edit(database, model, FACTS[2])
    assert ledger_findings(database, model) == []
    with database.read_session() as session:
        assert len(session.get_one(LedgerHead, model).active) == 3


def test_models_have_ledgers_of_their_own(database: Database) -> None:
    """An entry in the ledger of one model does not change the head of another."""
    one, two = add_model(database), add_model(database)
    apply_edit(database, one, FACTS[0])
    with database.read_session() as session:
        assert (ledger.head(session, one), ledger.head(session, two)) == (1, 0)


class TestVerify:
    @pytest.fixture
    def model(self, database: Database) -> Any:
        return add_model(database)

    @pytest.fixture
    def edit(self, database: Database, model: Any) -> Any:
        return apply_edit(database, model, FACTS[0])

    @pytest.mark.parametrize(
        ("where", "change"),
        [
            (
                "factors",
                lambda edit: update(StoredFactors).where(StoredFactors.edit_id == edit).values(data=b"other"),
            ),
            (
                "factors",
                lambda edit: update(StoredFactors).where(StoredFactors.edit_id == edit).values(sha256="0"),
            ),
            ("factors", lambda edit: delete(StoredFactors).where(StoredFactors.edit_id == edit)),
            (
                "state",
                lambda edit: update(LedgerHead).where(LedgerHead.hash != "").values(active={}),
            ),
            ("status", lambda edit: update(Job).where(Job.id == edit).values(status="reverted")),
            ("chain", lambda edit: update(Job).where(Job.id == edit).values(version=7)),
            ("chain", lambda edit: update(Job).where(Job.id == edit).values(reverted_version=2)),
            ("chain", lambda edit: delete(LedgerEntry).where(LedgerEntry.edit_id == edit)),
        ],
    )
    def test_tampered_rows_are_found(
        self, database: Database, model: Any, edit: Any, where: Any, change: Any
    ) -> None:
        """Verification finds changed or deleted factors, wrong fields of job rows, a wrong stored head, and a
        deleted last entry."""
        assert where in {finding.where for finding in findings_after(database, model, change(edit))}

    def test_recomputed_chain_with_a_wrong_state(self, database: Database, model: Any, edit: Any) -> None:
        """Verification finds an entry with a valid hash and a state that is not that of its active edits."""
        with database.write_session() as session:
            drop_append_only_guards(session)
            row = session.get_one(LedgerEntry, (model, 1))
            row.state = "0" * 64
            row.hash = ledger.chain_hash(row.previous, ledger.entries(session, model)[0])
        assert [finding.where for finding in ledger_findings(database, model)] == ["state"]

    def test_unreadable_entry(self, database: Database, model: Any, edit: Any) -> None:
        """An entry that is not valid JSON is a finding and not an exception."""
        found = findings_after(database, model, text("UPDATE ledger SET body = 'oops'"))
        assert [finding.where for finding in found] == ["chain"]

    def attest(self, database: Database, model: Any, *said: Any) -> None:
        with database.write_session() as session:
            for worker, version, digest, device in said:
                row = {"worker": worker, "version": version, "digest": digest, "device": device}
                session.add(Attestation(model=model, at=now(), **row))

    def test_replicas_agree(self, database: Database, model: Any, edit: Any) -> None:
        """Different digests of one version are not a finding when they are from different kinds of device."""
        self.attest(database, model, ("a", 1, "x", "cpu"), ("b", 1, "x", "cpu"), ("c", 1, "y", "cuda"))
        assert ledger_findings(database, model) == []

    def test_replicas_disagree(self, database: Database, model: Any, edit: Any) -> None:
        """Two digests of one version on one kind of device are a finding that names both workers."""
        self.attest(database, model, ("a", 1, "x", "cpu"), ("b", 1, "y", "cpu"))
        (finding,) = ledger_findings(database, model)
        assert finding.where == "replicas"
        assert "a at 1" in finding.detail
        assert "b at 1" in finding.detail

    def test_base_comes_back(self, database: Database, model: Any, edit: Any) -> None:
        """After the only edit is reverted, a digest that differs from that of the base is a finding."""
        revert_edit(database, model, edit)
        self.attest(database, model, ("a", 0, "base", "cpu"), ("a", 2, "other", "cpu"))
        assert [finding.where for finding in ledger_findings(database, model)] == ["replicas"]

    def test_attestation_of_missing_version(self, database: Database, model: Any, edit: Any) -> None:
        """An attestation of a version that the ledger lacks is a finding."""
        self.attest(database, model, ("a", 2, "x", "cpu"))
        assert [finding.where for finding in ledger_findings(database, model)] == ["replicas"]


def test_states_are_verified_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each edit is encoded once for all states, and a later verification computes the states of new entries only."""
    model, verified = add_model(database), VerifiedStates()
    edits = [apply_edit(database, model, (f"Subject {i}", "{} is")) for i in range(12)]
    encoded: list[Any] = []
    hashed: list[bytes] = []
    encode, sha256 = ledger.canonical_json, hashlib.sha256

    def count_encoding(value: Any) -> bytes:
        encoded.append(value)
        return encode(value)

    def count_hash(data: bytes) -> Any:
        hashed.append(data)
        return sha256(data)

    monkeypatch.setattr(active_set, "canonical_json", count_encoding)
    monkeypatch.setattr(hashlib, "sha256", count_hash)

    def verify() -> tuple[int, int]:
        encoded.clear()
        with database.read_session() as session:
            before = len(hashed)
            assert verify_ledger(session, model, verified) == []
        states = [x for x in hashed[before:] if x.startswith(b"[") and not x.endswith(b"[]]")]  # not the base
        return len(encoded), len(states)

    assert verify() == (len(edits), 12)
    revert_edit(database, model, edits[3])
    assert verify() == (len(edits), 1)
    assert verify()[1] == 0

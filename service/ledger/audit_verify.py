"""Verification of the audit records: their chain, their signatures, the rows that they cover, and anchors outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.models import AuditRecord, Job, LedgerEntry
from service.kit.signing import is_signed, key_id
from service.ledger import audit
from service.ledger.audit_coverage import (
    API_KEY,
    ATTESTATION,
    COVERAGE,
    EDIT,
    LEDGER,
    PAGE_SIZE,
    VERSION_NAME,
    format_of,
    row_digests,
)
from service.ledger.verify import LedgerFinding

MAX_FINDINGS = 100  #: findings of one kind that are listed
NAMES = {
    LEDGER: "ledger entry",
    EDIT: "edit",
    ATTESTATION: "attestation",
    API_KEY: "API key",
    VERSION_NAME: "name of a version",
}
#: where a finding about the rows of a kind is
PLACES = {LEDGER: "chain", EDIT: "edits", ATTESTATION: "replicas", API_KEY: "keys", VERSION_NAME: "names"}

#: public key, hash and signature of records whose signatures were verified: whether a signature is valid depends on
#: these three alone
VerifiedSignatures = set[tuple[str, str, str]]


@dataclass
class RecordChain:
    """What the audit records say."""

    hashes: list[str] = field(default_factory=list)  #: of the records, from position 1
    digests: dict[tuple[str, str], str] = field(default_factory=dict)  #: (kind, subject) -> its newest digest
    signers: list[str] = field(default_factory=list)  #: public keys, oldest first
    endorsed: list[bool] = field(default_factory=list)  #: whether each was endorsed by the key before it
    findings: list[LedgerFinding] = field(default_factory=list)

    @property
    def newest(self) -> dict[str, Any] | None:
        """Position and hash of the newest record."""
        return {"position": len(self.hashes), "hash": self.hashes[-1]} if self.hashes else None


def verify_records(
    session: Session, public_key: str, verified: VerifiedSignatures | None = None
) -> RecordChain:
    """Return what the records say, with all findings about them and the rows that they cover.

    `public_key` is the key that the caller trusts: that of the newest records, or an older one that endorsed them.
    Every record and every covered row is read and hashed each time. `verified` is kept by the caller: a signature is
    verified once.
    """
    chain = RecordChain()
    try:
        _read_chain(session, chain, set() if verified is None else verified)
    except ValueError as error:
        chain.findings.append(LedgerFinding("records", None, f"an audit record cannot be parsed: {error}"))
    chain.findings += _check_trust(chain, public_key)
    for kind in COVERAGE:
        try:
            differences = list(_compare_rows(session, kind, chain.digests))
        except ValueError as error:
            chain.findings.append(LedgerFinding(PLACES[kind], None, f"a row cannot be parsed: {error}"))
        else:
            chain.findings += _findings(session, kind, differences)
    return chain


def _findings(session: Session, kind: str, differences: list[tuple[str, str]]) -> Iterator[LedgerFinding]:
    for subject, what in differences[:MAX_FINDINGS]:
        version = _version_of(session, kind, subject)
        yield LedgerFinding(PLACES[kind], version, f"the {NAMES[kind]} {subject} {what}")
    if left_out := len(differences[MAX_FINDINGS:]):
        yield LedgerFinding(PLACES[kind], None, f"{left_out} more findings like these")


# the chain


def _read_chain(session: Session, chain: RecordChain, verified: VerifiedSignatures) -> None:
    problems = Counter[str]()
    previous = audit.GENESIS_HASH
    for record in _records(session):
        for problem in _record_problems(record, len(chain.hashes) + 1, previous, chain, verified):
            problems[problem] += 1
            if problems[problem] == 1:  # a change early in the chain breaks all that follows
                chain.findings.append(
                    LedgerFinding("records", None, f"audit record {record.position} {problem}")
                )
        previous = record.hash
        chain.hashes.append(record.hash)
        _apply(record, chain.digests)


def _records(session: Session) -> Iterator[AuditRecord]:
    """Yield the records as rows, which have the attributes of objects and take half of the time."""
    query = select(*AuditRecord.__table__.columns).order_by(AuditRecord.position)
    yield from cast(Iterator[AuditRecord], session.execute(query.execution_options(yield_per=PAGE_SIZE)))


def _record_problems(
    record: AuditRecord, position: int, previous: str, chain: RecordChain, verified: VerifiedSignatures
) -> Iterator[str]:
    if record.position != position:
        yield "does not follow the one before it: records are missing"
    elif record.previous != previous:
        yield "does not follow the one before it"
    if record.hash != audit.record_hash(record):
        yield "was changed after it was written"
    if record.kind == audit.SIGNER:
        _add_signer(record, chain)
    if not chain.signers or key_id(chain.signers[-1]) != record.signer:
        yield "is signed with another key than the ledger's"
    elif not _has_valid_signature(record, chain.signers[-1], verified):
        yield "has an invalid signature"


def _has_valid_signature(record: AuditRecord, public_key: str, verified: VerifiedSignatures) -> bool:
    known = (public_key, record.hash, record.signature)
    if known not in verified and audit.is_signed_record(record, public_key):
        verified.add(known)
    return known in verified


def _add_signer(record: AuditRecord, chain: RecordChain) -> None:
    public_key, endorsement = str(record.body.get("public_key")), record.body.get("endorsement")
    message = audit.endorsement_message(record.previous, public_key)
    endorsed = bool(chain.signers and endorsement and is_signed(chain.signers[-1], message, str(endorsement)))
    chain.signers.append(public_key)
    chain.endorsed.append(endorsed)


def _check_trust(chain: RecordChain, public_key: str) -> Iterator[LedgerFinding]:
    """Check that the newest records are signed with the trusted key, or with one that it endorsed."""
    if not chain.hashes:
        return
    if public_key not in chain.signers:
        yield LedgerFinding(
            "records", None, f"the audit records are signed with other keys than {key_id(public_key)}"
        )
        return
    newest = len(chain.signers) - 1 - chain.signers[::-1].index(public_key)
    if not all(chain.endorsed[newest + 1 :]):
        yield LedgerFinding(
            "records", None, f"the key {key_id(public_key)} was replaced by one that it did not endorse"
        )


def _apply(record: AuditRecord, digests: dict[tuple[str, str], str]) -> None:
    if record.kind in COVERAGE:
        digests[record.kind, record.subject] = record.digest
    elif record.kind == audit.REMOVAL:
        workers = {tuple(pair) for pair in record.body.get("attestations", ())}
        for kind, subject in list(digests):
            model, _, rest = subject.partition("/")
            if kind == ATTESTATION and (model, rest.partition("/")[2]) in workers:
                del digests[kind, subject]


# the rows


def _compare_rows(
    session: Session, kind: str, digests: Mapping[tuple[str, str], str]
) -> Iterator[tuple[str, str]]:
    """Yield each row that differs from its newest record, and what the difference is."""
    recorded = {subject: digest for (of_kind, subject), digest in digests.items() if of_kind == kind}
    present, older_formats = set[str](), set[int]()
    for subject, digest in row_digests(session, kind):
        present.add(subject)
        if subject not in recorded:
            yield subject, "has no audit record"
        elif format_of(recorded[subject]) != format_of(digest):
            older_formats.add(format_of(recorded[subject]))
        elif recorded[subject] != digest:
            yield subject, "was changed after it was recorded"
    for number in sorted(older_formats):
        in_format = {subject for subject in recorded if format_of(recorded[subject]) == number}
        known = dict(row_digests(session, kind, format=number)) if number in COVERAGE[kind].formats else {}
        for subject in sorted(in_format & present):
            if known.get(subject) != recorded[subject]:
                yield subject, "was changed after it was recorded"
    missing = recorded.keys() - present
    if kind != EDIT:  # edits without effect may be deleted, and the ledger shows which edits had one
        yield from ((subject, "was deleted") for subject in sorted(missing))


def _version_of(session: Session, kind: str, subject: str) -> int | None:
    if kind == EDIT:
        return session.scalar(select(Job.version).where(Job.id == subject))
    if kind in (LEDGER, ATTESTATION):
        number = subject.split("/")[1:2]
        return int(number[0]) if number and number[0].isdecimal() else None
    return None


# anchors outside the database


def check_heads(
    session: Session, chain: RecordChain, heads: Sequence[Mapping[str, Any]]
) -> Iterator[LedgerFinding]:
    """Compare the ledger with heads that were written outside the database. Yield the first difference of each kind."""
    if record := next((head for head in heads if not _has_record(chain, head)), None):
        yield _missing_head(record, f"audit record {record.get('position')}")
    heads_of_entries = [head for head in heads if "version" in head]
    entries = select(LedgerEntry.model, LedgerEntry.version, LedgerEntry.hash)
    hashes: dict[tuple[Any, Any], str] = (
        {(row[0], row[1]): row[2] for row in session.execute(entries)} if heads_of_entries else {}
    )
    for head in heads_of_entries:
        if hashes.get((head.get("model"), head["version"])) != head.get("hash"):
            yield _missing_head(head, f"version {head['version']}")
            return


def _has_record(chain: RecordChain, head: Mapping[str, Any]) -> bool:
    position = head.get("position")
    return isinstance(position, int) and hash_at(chain, position) == head.get("record")


def _missing_head(head: Mapping[str, Any], what: str) -> LedgerFinding:
    return LedgerFinding(
        "anchor",
        head.get("version"),
        f"{what} is not as the file of heads has it since {head.get('at')}: it was changed or removed, or a back-up was "
        "restored.",
    )


def hash_at(chain: RecordChain, position: int) -> str | None:
    """Return the hash of the record at a position; None if there is none."""
    return chain.hashes[position - 1] if 0 < position <= len(chain.hashes) else None


def entry_hash(session: Session, model: Any, version: Any) -> str | None:
    """Return the hash of a ledger entry; None if there is none."""
    query = select(LedgerEntry.hash).where(LedgerEntry.model == model, LedgerEntry.version == version)
    return session.scalar(query)

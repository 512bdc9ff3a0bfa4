"""Read-only access to a ledger, for a replica outside the service."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from sqlalchemy import select

from service.db.database import Database
from service.db.models import Attestation, Model
from service.errors import DigestMismatch, NotFound
from service.kit.versions import resolve_version
from service.ledger import ledger, version_names


class ReadOnlyLedger:
    """The ledger of one model. `attest` compares a digest with those of the workers and writes nothing."""

    def __init__(self, database: Database, model: str, device: str) -> None:
        self.database, self.model, self.device = database, model, device
        self.confirmed = False  #: whether a worker attested the same digest
        with database.read_session() as session:
            if session.get(Model, model) is None:
                known_models = ", ".join(
                    f"{m.name} ({m.fingerprint[:12]})" for m in session.scalars(select(Model))
                )
                raise NotFound(
                    f"the ledger has no model with the fingerprint {model[:12]}; it has: {known_models or 'none yet'}. Name the model, the "
                    "precision and the database that the service has."
                )

    def resolve_version(self, version: int | str) -> int:
        """Return the number of a version."""
        with self.database.read_session() as session:
            number_of = partial(version_names.number_of, session, self.model)
            return resolve_version(version, ledger.head(session, self.model), number_of=number_of)

    def head(self) -> int:
        """Return the newest version; 0 is the base model."""
        with self.database.read_session() as session:
            return ledger.head(session, self.model)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        with self.database.read_session() as session:
            entries = ledger.entries(session, self.model, up_to=version)
        return [(e.edit_id, e.body) for e in ledger.active_entries(entries)]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        with self.database.read_session() as session:
            return ledger.factors_of(session, edits)

    def gate_space(self, digest: str) -> bytes:
        """Return the serialized gate space with this digest."""
        with self.database.read_session() as session:
            return ledger.gate_space(session, digest)

    def attest(self, version: int, digest: str) -> None:
        """Raise DigestMismatch when workers on the same kind of device attested this version with other digests
        only."""
        query = select(Attestation.digest).where(
            Attestation.model == self.model,
            Attestation.version == version,
            Attestation.device == self.device,
            Attestation.withdrawn.is_(None),
        )
        with self.database.read_session() as session:
            digests = set(session.scalars(query))
        self.confirmed = digest in digests
        if digests and not self.confirmed:
            raise DigestMismatch(
                f"the local weights have the digest {digest[:12]}, those of the service {min(digests)[:12]}: use the model files and "
                "the library versions of its workers."
            )

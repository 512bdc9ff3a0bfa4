"""Exports: an adapter or edited weights, which a worker makes, and edits for another ledger, which are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.application import edit_set
from service.application.job_queue import Queue, draft
from service.application.served_model import resident
from service.application.validation import check_version
from service.db.models import Factors, Job, Model
from service.errors import Conflict, InvalidInput
from service.jobs import artifacts, views
from service.jobs.views import OPEN, Resource
from service.ledger import ledger
from service.recipes.recipe import METHODS
from service.schemas import ExportRequest, Version


class Exports:
    """What leaves the house."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.database = queue, queue.database

    def submit(self, version: Version, format: str, actor: str) -> Resource:
        """The job that makes a version's export, which is the same whoever asks: one that waits, runs or is still kept, or a new one."""
        with self.database.session() as session:
            model = resident(session)
            number, standing = _standing_at(session, model, version)
            _check_standing(number, standing, format)
            request = ExportRequest(version=number, format=format)
            subject = f"{format} of version {number}"
            ledger.lock(session, model.fingerprint)  # two who ask at once get one job
            same = select(Job).where(
                Job.model == model.fingerprint, Job.kind == "export", Job.subject == subject
            )
            for job in session.scalars(same.order_by(Job.id.desc())):
                if job.status in OPEN or (
                    job.status == "done" and artifacts.has(session, job.id, artifacts.piece(0))
                ):
                    return views.resource(session, job)
            self.queue.check_room(session, model, actor, 1, None)
            made = draft("export", model, request.model_dump(mode="json"), actor) | {"subject": subject}
            asked = Job(**made)
            session.add(asked)
            session.flush()
            answer = views.resource(session, asked)
        self.queue.ring([made])
        return answer

    def get(self, export_id: str) -> Resource:
        return self.queue.one("export", export_id)

    def file(self, export: Resource) -> Iterator[bytes]:
        """The file of an export that is done, piece by piece."""
        for number in range(export["result"]["pieces"]):
            with self.database.read() as session:
                piece = artifacts.get(session, export["id"], artifacts.piece(number))
            if piece is None:
                raise Conflict(f"{export['id']} is no longer kept: ask for the export again.")
            yield piece

    def edits(self, version: Version) -> tuple[int, int, Iterator[bytes]]:
        """The edits active at a version as a file for another ledger (`service/application/edit_set.py`): the version's number, the size of the
        file in bytes, and the file piece by piece."""
        with self.database.read() as session:
            model = resident(session)
            number, standing = _standing_at(session, model, version)
            _check_standing(number, standing, "edits")
            past = ledger.entries(session, model.fingerprint, up_to=number)
            ids = [e.edit_id for e in standing]
            requests = session.execute(select(Job.id, Job.request).where(Job.id.in_(ids)))
            asked = {row.id: row.request for row in requests}
            lengths = select(Factors.edit_id, func.length(Factors.data).label("size"))
            sizes = {
                row.edit_id: row.size for row in session.execute(lengths.where(Factors.edit_id.in_(ids)))
            }
        base = {"name": model.name, "fingerprint": model.fingerprint}
        base |= {name: model.info[name] for name in ("architecture", "dtype") if name in model.info}
        beginning = edit_set.beginning(edit_set.described(base, number, past, standing, asked), sizes)
        return number, len(beginning) + sum(sizes.values()), self._vectors(beginning, ids)

    def _vectors(self, beginning: bytes, ids: Sequence[str]) -> Iterator[bytes]:
        yield beginning
        for edit_id in ids:
            with self.database.read() as session:
                yield ledger.factors_of(session, [edit_id])[edit_id]


def _standing_at(session: Session, model: Model, version: Version) -> tuple[int, list[ledger.Entry]]:
    """The number of a version, and the entries of the edits active at it."""
    head = ledger.head(session, model.fingerprint)
    check_version(head, version)
    number = {"head": head, "base": 0}[version] if isinstance(version, str) else version
    return number, ledger.active_entries(ledger.entries(session, model.fingerprint, up_to=number))


def _check_standing(version: int, standing: Sequence[ledger.Entry], format: str) -> None:
    """There is something to export, and the form can hold it."""
    if not standing:
        raise InvalidInput(f"no edit is active at version {version}: there is nothing to export.", "version")
    dense = [e.edit_id for e in standing if not METHODS[e.body.get("method", "rome")].associates]
    if format == "peft" and dense:
        some = ", ".join(dense[:5]) + (f" and {len(dense) - 5} more" if len(dense) > 5 else "")
        raise InvalidInput(
            f"an adapter holds changes of low rank, and fine-tuning changes a whole weight: {some}. Export the edited weights "
            "(format=safetensors), or a version without these edits.",
            "format",
        )

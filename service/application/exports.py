"""Exports: an adapter or edited weights, which a worker makes, and edits for another ledger, which are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.application import edit_set
from service.application.job_queue import JobQueue, new_job_row
from service.application.served_model import get_served_model
from service.db.models import Job, Model, StoredFactors
from service.errors import Conflict, InvalidInput
from service.jobs import artifacts, views
from service.jobs.views import OPEN_STATUSES, ResourceDict
from service.kit.versions import resolve_version
from service.ledger import ledger
from service.methods.registry import METHODS
from service.schemas import ExportRequest, Version


class ExportService:
    """What leaves the house."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue, self.database = queue, queue.database

    def submit(self, version: Version, format: str, actor: str) -> ResourceDict:
        """The job that makes a version's export, which is the same whoever asks: one that waits, runs or is still kept, or a new one."""
        with self.database.write_session() as session:
            model = get_served_model(session)
            number, active_entries = _active_entries_at(session, model, version)
            _check_exportable(number, active_entries, format)
            request = ExportRequest(version=number, format=format)
            subject = f"{format} of version {number}"
            ledger.lock_ledger(session, model.fingerprint)  # two who ask at once get one job
            matching = select(Job).where(
                Job.model == model.fingerprint, Job.kind == "export", Job.subject == subject
            )
            for job in session.scalars(matching.order_by(Job.id.desc())):
                if job.status in OPEN_STATUSES or (
                    job.status == "done" and artifacts.has_artifact(session, job.id, artifacts.chunk_name(0))
                ):
                    return views.serialize_job(session, job)
            self.queue.check_queue_limits(session, model, actor, 1, None)
            row = new_job_row("export", model, request.model_dump(mode="json"), actor) | {"subject": subject}
            new_job = Job(**row)
            session.add(new_job)
            session.flush()
            view = views.serialize_job(session, new_job)
        self.queue.notify_workers([row])
        return view

    def get(self, export_id: str) -> ResourceDict:
        return self.queue.get("export", export_id)

    def stream_file(self, export: ResourceDict) -> Iterator[bytes]:
        """The file of an export that is done, piece by piece."""
        for number in range(export["result"]["pieces"]):
            with self.database.read_session() as session:
                chunk = artifacts.get_artifact(session, export["id"], artifacts.chunk_name(number))
            if chunk is None:
                raise Conflict(f"{export['id']} is no longer kept: ask for the export again.")
            yield chunk

    def export_edit_set(self, version: Version) -> tuple[int, int, Iterator[bytes]]:
        """The edits active at a version as a file for another ledger (`service/application/edit_set.py`): the version's number, the size of the
        file in bytes, and the file piece by piece."""
        with self.database.read_session() as session:
            model = get_served_model(session)
            number, active_entries = _active_entries_at(session, model, version)
            _check_exportable(number, active_entries, "edits")
            ledger_entries = ledger.entries(session, model.fingerprint, up_to=number)
            ids = [e.edit_id for e in active_entries]
            requests = session.execute(select(Job.id, Job.request).where(Job.id.in_(ids)))
            request_by_edit = {row.id: row.request for row in requests}
            lengths = select(StoredFactors.edit_id, func.length(StoredFactors.data).label("size"))
            sizes = {
                row.edit_id: row.size
                for row in session.execute(lengths.where(StoredFactors.edit_id.in_(ids)))
            }
        base = {"name": model.name, "fingerprint": model.fingerprint}
        base |= {name: model.info[name] for name in ("architecture", "dtype") if name in model.info}
        header = edit_set.edit_set_header(
            edit_set.build_edit_set(base, number, ledger_entries, active_entries, request_by_edit), sizes
        )
        return number, len(header) + sum(sizes.values()), self._stream_edit_set(header, ids)

    def _stream_edit_set(self, header: bytes, ids: Sequence[str]) -> Iterator[bytes]:
        yield header
        for edit_id in ids:
            with self.database.read_session() as session:
                yield ledger.factors_of(session, [edit_id])[edit_id]


def _active_entries_at(session: Session, model: Model, version: Version) -> tuple[int, list[ledger.Entry]]:
    """The number of a version, and the entries of the edits active at it."""
    head = ledger.head(session, model.fingerprint)
    number = resolve_version(version, head)
    return number, ledger.active_entries(ledger.entries(session, model.fingerprint, up_to=number))


def _check_exportable(version: int, active_entries: Sequence[ledger.Entry], format: str) -> None:
    """There is something to export, and the form can hold it."""
    if not active_entries:
        raise InvalidInput(f"no edit is active at version {version}: there is nothing to export.", "version")
    dense = [e.edit_id for e in active_entries if not METHODS[e.body.get("method", "rome")].needs_covariance]
    if format == "peft" and dense:
        shown_ids = ", ".join(dense[:5]) + (f" and {len(dense) - 5} more" if len(dense) > 5 else "")
        raise InvalidInput(
            f"an adapter holds changes of low rank, and fine-tuning changes a whole weight: {shown_ids}. Export the edited weights "
            "(format=safetensors), or a version without these edits.",
            "format",
        )

"""Exports of a version: an adapter or edited weights, which a worker writes, and edit sets, which are read from the
ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.application import edit_set
from service.application.caller import DEFAULT_LIMITS, CallerLimits
from service.application.job_queue import Idempotency, get_job, new_job_row, save_idempotency_key
from service.application.job_resource import JobResourceService
from service.application.served_model import get_served_model
from service.application.version_names import find_version
from service.db.models import Job, Model, StoredFactors
from service.errors import Conflict, InvalidInput
from service.jobs import artifacts, views
from service.jobs.views import OPEN_STATUSES, ResourceDict
from service.ledger import ledger
from service.methods.method import EditMethod
from service.methods.registry import DEFAULT_METHOD, METHODS
from service.schemas import ExportRequest, Version

EDIT_SET_MEDIA_TYPE = "application/octet-stream"
_EDITS_PER_READ = 64  # edits whose factors are in memory together


@dataclass(frozen=True)
class ExportFile:
    """The file of a finished export."""

    name: str
    media_type: str
    size: int  #: bytes
    chunks: Iterator[bytes]


@dataclass(frozen=True)
class _EditSetContent:
    """The header of an edit set, and the sizes in bytes of what follows it, in the order of the file."""

    header: bytes
    factor_sizes: dict[str, int]  #: by edit id
    shared_sizes: dict[str, int]  #: of the gate spaces, by digest

    @property
    def size(self) -> int:
        return len(self.header) + sum(self.factor_sizes.values()) + sum(self.shared_sizes.values())


class ExportService(JobResourceService):
    """Jobs that make a file of a version.

    An edit set needs no worker: its job is done when it is created, and its file is read from the ledger on download.
    """

    def submit(
        self,
        request: ExportRequest,
        actor: str,
        idempotency: Idempotency | None = None,
        limits: CallerLimits = DEFAULT_LIMITS,
    ) -> ResourceDict:
        """Return the export of this version and format: one that is open or whose file is kept, else a new one."""
        if (previous := self.queue.find_by_idempotency_key(actor, idempotency)) is not None:
            return previous[0]
        try:
            with self.queue.database.write_session() as session:
                model = get_served_model(session)
                ledger.lock_ledger(session, model.fingerprint)  # concurrent requests share one job
                version, active_entries = _active_entries_at(session, model, request.version)
                _check_exportable(version, active_entries, request.format, request.solve_gated)
                row = self._new_row(session, model, version, active_entries, request, actor)
                job = _reusable_job(session, model, row["subject"])
                is_new = job is None
                if job is None:
                    if row["status"] == "queued":
                        self.queue.check_queue_limits(session, model, actor, 1, limits)
                    row["cost"] /= limits.weight
                    job = Job(**row)
                    session.add(job)
                    session.flush()
                if idempotency is not None:
                    save_idempotency_key(session, actor, idempotency, [job.id])
                view = views.serialize_job(session, job)
        except IntegrityError:  # a concurrent request with the same key was first
            previous = self.queue.find_by_idempotency_key(actor, idempotency)
            if previous is None:
                raise
            return previous[0]
        if is_new and row["status"] == "queued":
            self.queue.notify_workers([row])
        return view

    def open_file(self, export_id: str) -> ExportFile:
        """Return the file of a finished export. Raises Conflict if it is not finished, or no longer kept."""
        with self.queue.database.read_session() as session:
            job = get_job(session, self.kind.name, export_id)
            result: dict[str, Any] = job.result or {}
            if job.status != "done":
                reason = (job.error or {}).get("detail")
                raise Conflict(
                    f"{export_id} is {job.status}" + (f": {reason}" if reason else "; it has no file.")
                )
            if job.request["format"] != "edits" and not _has_file(session, job):
                raise Conflict(f"The file of {export_id} is no longer kept: create the export again.")
        if job.request["format"] == "edits":
            _, size, chunks = self.export_edit_set(job.request["version"])
            return ExportFile(result["file"], result["media_type"], size, chunks)
        return ExportFile(
            result["file"], result["media_type"], result["bytes"], self._stream_file(job.id, result["pieces"])
        )

    def export_edit_set(self, version: Version) -> tuple[int, int, Iterator[bytes]]:
        """Return an edit set (`service/application/edit_set.py`): the number of the version, the size in bytes and the
        chunks."""
        with self.queue.database.read_session() as session:
            model = get_served_model(session)
            number, active_entries = _active_entries_at(session, model, version)
            _check_exportable(number, active_entries, "edits")
            content = _edit_set_content(session, model, number, active_entries)
        return number, content.size, self._stream_edit_set(content)

    def _new_row(
        self,
        session: Session,
        model: Model,
        version: int,
        active_entries: Sequence[ledger.Entry],
        request: ExportRequest,
        actor: str,
    ) -> dict[str, Any]:
        stored_request: dict[str, Any] = {"version": version, "format": request.format}
        solves = request.solve_gated and bool(_gated_edits(active_entries))
        if solves:
            stored_request["solve_gated"] = True
        row = new_job_row(self.kind.name, model, stored_request, actor)
        row["subject"] = f"{request.format} of version {version}" + (", gated edits solved" if solves else "")
        if request.format == "edits":
            content = _edit_set_content(session, model, version, active_entries)
            row |= {
                "status": "done",
                "started": row["created"],
                "ended": row["created"],
                "result": {
                    "file": f"version-{version}.edits.safetensors",
                    "media_type": EDIT_SET_MEDIA_TYPE,
                    "bytes": content.size,
                },
            }
        return row

    def _stream_file(self, export_id: str, chunk_count: int) -> Iterator[bytes]:
        for number in range(chunk_count):
            with self.queue.database.read_session() as session:
                chunk = artifacts.get_artifact(session, export_id, artifacts.chunk_name(number))
            if chunk is None:
                raise Conflict(f"The file of {export_id} is no longer kept: create the export again.")
            yield chunk

    def _stream_edit_set(self, content: _EditSetContent) -> Iterator[bytes]:
        yield content.header
        for edit_id in content.factor_sizes:
            with self.queue.database.read_session() as session:
                yield ledger.factors_of(session, [edit_id])[edit_id]
        for digest in content.shared_sizes:
            with self.queue.database.read_session() as session:
                yield ledger.gate_space(session, digest)


def _reusable_job(session: Session, model: Model, subject: str) -> Job | None:
    """Return the newest export with this subject that is open, or whose file can be read."""
    matching = select(Job).where(Job.model == model.fingerprint, Job.kind == "export", Job.subject == subject)
    for job in session.scalars(matching.order_by(Job.id.desc())):
        is_done = job.status == "done" and (job.request["format"] == "edits" or _has_file(session, job))
        if job.status in OPEN_STATUSES or is_done:
            return job
    return None


def _has_file(session: Session, job: Job) -> bool:
    return artifacts.has_artifact(session, job.id, artifacts.chunk_name(0))


def _edit_set_content(
    session: Session, model: Model, version: int, active_entries: Sequence[ledger.Entry]
) -> _EditSetContent:
    """Return what the file of an edit set consists of."""
    ledger_entries = ledger.entries(session, model.fingerprint, up_to=version)
    ids = [e.edit_id for e in active_entries]
    requests = session.execute(select(Job.id, Job.request).where(Job.id.in_(ids)))
    request_by_edit = {row.id: row.request for row in requests}
    lengths = select(StoredFactors.edit_id, func.length(StoredFactors.data).label("size"))
    size_by_edit = {
        row.edit_id: row.size for row in session.execute(lengths.where(StoredFactors.edit_id.in_(ids)))
    }
    factor_sizes = {edit_id: size_by_edit[edit_id] for edit_id in ids}
    with_shared = [e.edit_id for e in active_entries if _is_gated(e) or _method_of(e).keeps_records]
    shared_names = _shared_names(session, with_shared)
    shared_sizes = {digest: ledger.gate_space_size(session, digest) for digest in shared_names}
    base = {"name": model.name, "fingerprint": model.fingerprint}
    base |= {name: model.info[name] for name in ("architecture", "dtype") if name in model.info}
    exported = edit_set.build_edit_set(base, version, ledger_entries, active_entries, request_by_edit)
    sizes = factor_sizes | {shared_names[digest]: n for digest, n in shared_sizes.items()}
    return _EditSetContent(edit_set.edit_set_header(exported, sizes), factor_sizes, shared_sizes)


def _gated_edits(active_entries: Sequence[ledger.Entry]) -> list[str]:
    """Return the ids of the gated edits among the active ones."""
    return [e.edit_id for e in active_entries if _is_gated(e)]


def _is_gated(entry: ledger.Entry) -> bool:
    return bool(entry.body.get("hparams", {}).get("form") == "gated")


def _shared_names(session: Session, edits: Sequence[str]) -> dict[str, str]:
    """Return the gate spaces and classifiers that these edits name, with their names in a file, by digest and in its
    order."""
    names: dict[str, str] = {}
    for start in range(0, len(edits), _EDITS_PER_READ):
        for factors in ledger.factors_of(session, edits[start : start + _EDITS_PER_READ]).values():
            names |= edit_set.shared_names(factors)
    return dict(sorted(names.items()))


def _active_entries_at(session: Session, model: Model, version: Version) -> tuple[int, list[ledger.Entry]]:
    """Return the number of a version, and the entries of the edits active at it."""
    number = find_version(session, model, version)
    return number, ledger.active_entries(ledger.entries(session, model.fingerprint, up_to=number))


def _check_exportable(
    version: int, active_entries: Sequence[ledger.Entry], format: str, solve_gated: bool = False
) -> None:
    """Raise InvalidInput if the version has no active edits, or if the format cannot represent them."""
    if not active_entries:
        raise InvalidInput(f"no edit is active at version {version}: there is nothing to export.", "version")
    looked_up = [e.edit_id for e in active_entries if _method_of(e).is_looked_up]
    if looked_up and format != "edits":
        titles = " and ".join(
            dict.fromkeys(_method_of(e).title for e in active_entries if _method_of(e).is_looked_up)
        )
        raise InvalidInput(
            f"edits by {titles} are looked up and are in no weight: {_some_ids(looked_up)}. Export an edit set (format=edits), "
            "which holds them exactly, or a version without them.",
            "format",
        )
    gated = _gated_edits(active_entries)
    if gated and format != "edits" and not solve_gated:
        raise InvalidInput(
            f"gated edits are looked up and are in no weight: {_some_ids(gated)}. Export an edit set (format=edits), which "
            "holds them exactly, solve them into the weights with a measured difference (solve_gated=true), or export a "
            "version without them.",
            "format",
        )
    dense = [e.edit_id for e in active_entries if not _method_of(e).writes_associations]
    if format == "peft" and dense:
        raise InvalidInput(
            f"an adapter holds low-rank changes, and fine-tuning changes whole weights: {_some_ids(dense)}. Export the edited weights "
            "(format=safetensors), or a version without these edits.",
            "format",
        )


def _method_of(entry: ledger.Entry) -> EditMethod:
    return METHODS[entry.body.get("method", DEFAULT_METHOD)]


def _some_ids(ids: Sequence[str]) -> str:
    """Return at most five ids, and how many more there are."""
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")

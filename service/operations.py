"""The verbs of the house: what the doors call. Each is one transaction, and free of torch.

Everything is checked before anything is written; what is announced is committed.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session, defer
from tokenizers import Tokenizer

from service import faults, metrics, portable
from service.checks import (
    check_edit,
    check_evaluation,
    check_speech,
    check_trace,
    check_version,
    place,
    with_methods,
)
from service.editors.recipes import METHODS
from service.errors import Conflict, InvalidInput, NotFound, QueueFull, Unavailable
from service.ids import kind_of, new_id, request_id
from service.jobs import parts, resources, workers
from service.jobs.broker import CALLS, JOBS, Broker, Event, told
from service.jobs.listening import heard
from service.jobs.resources import EDIT_STATUSES, OPEN, STATUSES, Resource
from service.ledger import ledger
from service.ledger.verify import verify
from service.naming import called, version_called
from service.pages import check_limit, cursor_after, read_cursor, strange_cursor
from service.portable import Given
from service.requests import (
    CompareRequest,
    EditRequest,
    EvaluationRequest,
    ExportRequest,
    GenerateRequest,
    SpeechRequest,
    TraceRequest,
    Version,
)
from service.settings import Settings
from service.store.database import Database
from service.store.tables import Attestation, Factors, IdempotencyKey, Job, LedgerEntry, Model, Worker, now
from service.text import check_tokens, fact_key, words

#: an Idempotency-Key and a fingerprint of the body that came with it
Idempotency = tuple[str, str]
T = TypeVar("T")

log = logging.getLogger(__name__)

MAX_KEY = 255
LOOK = 3.0  #: silent seconds after which a listener looks whether the row has ended without a word


@dataclass(frozen=True)
class Named:
    """A version under the name that it is asked for. Versions of one `state` have the same weights."""

    id: str
    version: int
    state: str
    created: datetime


@dataclass(frozen=True)
class Speech:
    """What was asked of a worker, pinned to a version, and the channel on which it comes."""

    channel: str
    request: SpeechRequest
    named: Named


class Operations:
    """All methods but `events` block on the database: call them from a thread. Safe to share between threads."""

    def __init__(self, database: Database, broker: Broker, settings: Settings) -> None:
        self.database = database
        self.broker = broker
        self.settings = settings
        self.lease = timedelta(seconds=settings.lease)
        self._tokenizer: tuple[tuple[str, datetime], Tokenizer] | None = None  # of the resident model
        self._speaker: tuple[Model, Tokenizer] | None = None  # the resident model as it was last registered

    # models

    def model(self) -> Resource:
        """The resident model: all of its info, its head, workers and active edits, and how many jobs wait and run."""
        with self.database.read() as session:
            model = _resident(session)
            head = ledger.head(session, model.fingerprint)
            listed = workers.listed(session, model.fingerprint, self.lease)
            return {
                **model.info,
                "fingerprint": model.fingerprint,
                "name": model.name,
                "head": head,
                "active_edits": session.scalar(select(func.count()).where(*_active(model))),
                "jobs": _counts(session, model),
                "workers": [workers.resource(worker, head) for worker in listed],
                "created": ledger.moment(model.created),
            }

    def models(self) -> list[Resource]:
        """The resident model as a list of one."""
        return [self.model()]

    def ready(self) -> Resource:
        """What is up; raises Unavailable, whose `extra["reasons"]` lists all that is not."""
        reasons: list[str] = []
        calls = _tried(lambda: {kind: self.broker.waiting(kind) for kind in CALLS}, reasons)
        standing = _tried(self._standing, reasons)
        if standing is not None:
            head, due, listed, queued = standing
            waiting = (calls or {}) | queued
            reasons += _unready(listed, due, waiting)
        if standing is None or reasons:
            raise Unavailable("; ".join(reasons) + ".", reasons=reasons)
        shown = [workers.resource(worker, head) for worker in listed]
        return {"ready": True, "head": head, "workers": shown, "waiting": waiting}

    def _standing(self) -> tuple[int, int, list[Worker], dict[str, int]]:
        """The head, the newest version that a worker has had time to reach, the workers, and how many jobs wait."""
        with self.database.read() as session:
            model = _resident(session)
            listed = workers.listed(session, model.fingerprint, self.lease)
            head = ledger.head(session, model.fingerprint)
            return head, self._due(session, model), listed, _waiting(session, model)

    def _due(self, session: Session, model: Model) -> int:
        settled = select(func.max(LedgerEntry.version)).where(
            LedgerEntry.model == model.fingerprint, LedgerEntry.at < now() - self.lease
        )
        return session.scalar(settled) or 0

    def check_attended(self, kind: str) -> None:
        """Raise Unavailable when no living worker does this kind of work: whoever waits for it waits in vain."""
        role = next(role for role, kinds in workers.ROLES.items() if kind in kinds)
        with self.database.read() as session:
            listed = workers.listed(session, _resident(session).fingerprint, self.lease)
        if not workers.serving(listed, role):
            raise Unavailable(f"no worker is alive that does {role}: start one, and ask again.")

    # edits

    def submit_edits(
        self,
        requests: Sequence[EditRequest],
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> list[Resource]:
        """Queue edits, all or none. The same key and body again gives the same edits again.

        `max_queued` jobs of this actor may wait at once; the settings say how many when it is left out.
        """
        if (known := self._known(actor, idempotency)) is not None:
            return known
        with self.database.read() as session:
            model = _resident(session)
            tokenizer = self._tokenizer_of(model)
        requests = with_methods(requests, model)
        for number, request in enumerate(requests):
            with place(f"edits.{number}" if len(requests) > 1 else ""):
                check_edit(request, model, tokenizer)
        jobs = [_edit_job(model, request, actor) for request in requests]
        return self._submit(jobs, model, actor, idempotency, max_queued)

    def edit(self, edit_id: str) -> Resource:
        return self._job("edit", edit_id)

    def edits(
        self,
        status: str | None = None,
        subject: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Resource:
        """{"items": newest first, "next": cursor or None}."""
        if status is not None and status not in EDIT_STATUSES:
            raise InvalidInput(f"`status` must be one of {', '.join(EDIT_STATUSES)}.", "status")
        return self._jobs(
            "edit", cursor, limit, status=status, subject=None if subject is None else words(subject)
        )

    def revert_edit(self, edit_id: str, actor: str) -> Resource:
        """Take an edit back, whatever it has come to; harmless when there is nothing to take back."""
        return self._take_back("edit", edit_id, actor)

    def delta(self, edit_id: str) -> bytes:
        """The edit's vectors as safetensors."""
        with self.database.read() as session:
            job = _found(session, "edit", edit_id)
            factors = session.get(Factors, edit_id)
            if factors is None:
                raise Conflict(f"{edit_id} is {job.status}: only an edit that was applied has vectors.")
            return factors.data

    # traces

    def submit_trace(
        self,
        request: TraceRequest,
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> Resource:
        if (known := self._known(actor, idempotency)) is not None:
            return known[0]
        model, tokenizer, head = self._at_head()
        check_version(head, request.version)
        check_trace(request, model, tokenizer)
        job = _job("trace", model, request.model_dump(mode="json"), actor) | {
            "subject": words(request.subject)
        }
        return self._submit([job], model, actor, idempotency, max_queued)[0]

    def trace(self, trace_id: str) -> Resource:
        return self._job("trace", trace_id)

    def traces(self, cursor: str | None = None, limit: int = 50) -> Resource:
        """{"items": newest first, "next": cursor or None}."""
        return self._jobs("trace", cursor, limit)

    def cancel_trace(self, trace_id: str) -> Resource:
        """Stop a trace that waits or runs; harmless when it has ended."""
        return self._take_back("trace", trace_id, "")

    # evaluations

    def submit_evaluation(
        self,
        request: EvaluationRequest,
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> Resource:
        """Queue an evaluation. Its records are kept beside its row, and only while it is open."""
        if (known := self._known(actor, idempotency)) is not None:
            return known[0]
        model, tokenizer, _ = self._at_head()
        check_evaluation(request, model, tokenizer)
        count = None if request.records is None else len(request.records)
        asked = request.model_dump(mode="json", exclude={"records"}) | {"records": count}
        job = _job("evaluation", model, asked, actor) | {
            "subject": f"{request.method} on {request.dataset or f'{count} records'}"
        }
        kept = {} if request.records is None else {parts.RECORDS: json.dumps(request.records).encode()}
        return self._submit([job], model, actor, idempotency, max_queued, {job["id"]: kept})[0]

    def evaluation(self, evaluation_id: str) -> Resource:
        return self._job("evaluation", evaluation_id)

    def evaluations(self, cursor: str | None = None, limit: int = 50) -> Resource:
        """{"items": newest first, without their results, "next": cursor or None}."""
        return self._jobs("evaluation", cursor, limit)

    def cancel_evaluation(self, evaluation_id: str) -> Resource:
        """Stop an evaluation that waits or runs; harmless when it has ended."""
        return self._take_back("evaluation", evaluation_id, "")

    # export and import

    def export(self, version: Version, format: str, actor: str) -> Resource:
        """The job that makes a version's export, which is the same whoever asks: one that waits, runs or is still kept, or a new one."""
        with self.database.session() as session:
            model = _resident(session)
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
                    job.status == "done" and parts.has(session, job.id, parts.piece(0))
                ):
                    return resources.resource(session, job)
            self._check_room(session, model, actor, 1, None)
            made = _job("export", model, request.model_dump(mode="json"), actor) | {"subject": subject}
            row = Job(**made)
            session.add(row)
            session.flush()
            answer = resources.resource(session, row)
        self._ring([made])
        return answer

    def exported(self, export_id: str) -> Resource:
        return self._job("export", export_id)

    def export_file(self, export: Resource) -> Iterator[bytes]:
        """The file of an export that is done, piece by piece."""
        for number in range(export["result"]["pieces"]):
            with self.database.read() as session:
                piece = parts.get(session, export["id"], parts.piece(number))
            if piece is None:
                raise Conflict(f"{export['id']} is no longer kept: ask for the export again.")
            yield piece

    def exported_edits(self, version: Version) -> tuple[int, int, Iterator[bytes]]:
        """The edits active at a version as a file for another ledger (`service/portable.py`): the version's number, the size of the
        file in bytes, and the file piece by piece."""
        with self.database.read() as session:
            model = _resident(session)
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
        beginning = portable.beginning(portable.described(base, number, past, standing, asked), sizes)
        return number, len(beginning) + sum(sizes.values()), self._vectors(beginning, ids)

    def _vectors(self, beginning: bytes, ids: Sequence[str]) -> Iterator[bytes]:
        yield beginning
        for edit_id in ids:
            with self.database.read() as session:
                yield ledger.factors_of(session, [edit_id])[edit_id]

    def import_edits(
        self,
        data: bytes,
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> tuple[list[Resource], list[str]]:
        """Queue the edits of a file that another ledger made, all or none; those that are here already are left alone. All of them,
        in the order of the file, and the ids of those that were here."""
        if (known := self._known(actor, idempotency)) is not None:
            return known, [edit["id"] for edit in known]
        model, tokenizer, _ = self._at_head()
        given = portable.read(data, model.fingerprint, model.info)
        for g in given:
            with place(f"edits.{g.edit.origin.edit}"):
                check_edit(g.request, model, tokenizer)
        try:
            with self.database.session() as session:
                ledger.lock(
                    session, model.fingerprint
                )  # who imports the same beside us waits, and finds ours
                here = _here(session, model, given)
                jobs = {g.name: _given_job(model, g, actor) for g in given if g.name not in here}
                kept = {jobs[g.name]["id"]: _parts_of(g) for g in given if g.name in jobs}
                ids = [here[g.name] if g.name in here else str(jobs[g.name]["id"]) for g in given]
                self._add(session, list(jobs.values()), model, actor, max_queued, kept)
                if idempotency is not None:
                    _remember(session, actor, idempotency, ids)
                rows = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(ids)))}
                answer = resources.several(session, [rows[edit_id] for edit_id in ids])
        except IntegrityError:  # the same key came in beside us, and was first
            known = self._known(actor, idempotency)
            if known is None:
                raise
            return known, [edit["id"] for edit in known]
        self._ring(list(jobs.values()))
        return answer, sorted(here.values())

    # any job

    def jobs(
        self,
        status: str | None = None,
        kind: str | None = None,
        dead: bool | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Resource:
        """Jobs of all kinds: {"items": newest first, "next": cursor or None}. `dead`: given up after too many attempts."""
        check_limit(limit)
        if status is not None and status not in STATUSES:
            raise InvalidInput(f"`status` must be one of {', '.join(STATUSES)}.", "status")
        if kind is not None and kind not in JOBS:
            raise InvalidInput(f"`kind` must be one of {', '.join(JOBS)}.", "kind")
        wanted = {Job.status: status, Job.kind: kind, Job.dead: dead}
        with self.database.read() as session:
            query = _lean(Job.request, Job.result).where(Job.model == _resident(session).fingerprint)
            query = query.where(*(column == value for column, value in wanted.items() if value is not None))
            query = query.where(*_older(session, read_cursor(cursor, str)))
            found = list(session.scalars(query.order_by(Job.created.desc(), Job.id.desc()).limit(limit + 1)))
            more = cursor_after(found[limit - 1].id) if len(found) > limit else None
            return {"items": [resources.summary(job) for job in found[:limit]], "next": more}

    def retry(self, job_id: str, actor: str) -> Resource:
        """Let a failed job wait again, as if it had never been tried."""
        with self.database.session() as session:
            job = _held(session, _found(session, None, job_id))
            if job.status != "failed":
                raise Conflict(f"{job_id} is {job.status}: only a job that failed can be tried again.")
            job.status, job.attempts, job.dead, job.cancel_requested = "queued", 0, False, False
            job.error = job.result = job.progress = job.worker = job.started = job.ended = None
            job.updated, job.request_id = now(), request_id.get() or job.request_id
            session.flush()
            self.broker.forget(job_id)  # before the commit: a worker's first word about it must not be lost
            kind, answer = job.kind, resources.summary(job)
        log.info("job retried", extra={"job": job_id, "actor": actor})
        with told(job_id):
            self.broker.announce(job_id, kind)
        return answer

    async def events(self, job_id: str, after: str | None = None) -> AsyncIterator[Event]:
        """Progress, then a last event "end" with the resource. A job that has ended gives its end at once.

        The row is looked at in the silences: a worker can die between the commit of an end and telling it.
        """
        if ended := await asyncio.to_thread(self._ended, job_id):
            yield ended
            return
        async with aclosing(heard(self.broker.events(job_id, after), LOOK)) as every:
            async for event in every:
                if event is not None:
                    yield event
                elif ended := await asyncio.to_thread(self._ended_quietly, job_id):
                    yield ended
                    return

    def _ended_quietly(self, job_id: str) -> Event | None:
        with suppress(Unavailable):
            return self._ended(job_id)
        return None

    def _ended(self, job_id: str) -> Event | None:
        with self.database.read() as session:
            job = session.get(Job, job_id)
            if job is None:
                raise NotFound(f"there is no {job_id}.")
            if job.status in OPEN or job.ended is None:
                return None
            return Event(str(int(job.ended.timestamp() * 1e6)), "end", resources.resource(session, job))

    # speech

    def generate(self, request: GenerateRequest) -> str:
        """Ask a worker to speak; the payload is the request as JSON. The answer comes on the channel returned.

        What is asked for beyond the model's positions is not refused: the text ends there, with "length".
        """
        self._check_tokens_asked(request)
        model, tokenizer, head = self._at_head()
        check_version(head, request.version, request.min_version)
        for text in request.texts():
            check_tokens(tokenizer, text, None, model.info["positions"])
        return self._call("generate", request.model_dump(mode="json"))

    def complete(self, name: str, request: SpeechRequest) -> Speech:
        """Ask a worker to go on with prompts, at the version that the name means now.

        The version and the seed are settled here, so that whoever begins the answer anew says the same.
        """
        model, tokenizer, head = self._at_head()
        version = version_called(name, model.name, head)
        self._check_tokens_asked(request, "max_tokens")
        check_speech(request, model, tokenizer)
        with self.database.read() as session:
            (named,) = _named(session, model, [(called(model.name, version), version)])
        request = request.model_copy(update={"version": version})
        return Speech(self._call("generate", request.model_dump(mode="json")), request, named)

    def names(self, recent: int = 20) -> list[Named]:
        """What the model and its versions are called: the head and the base, and by number the newest ones."""
        with self.database.read() as session:
            model = _resident(session)
            head = ledger.head(session, model.fingerprint)
            always = [(model.name, head), (f"{model.name}@head", head), (f"{model.name}@base", 0)]
            numbers = range(head, max(head - recent, -1), -1)
            return _named(session, model, [*always, *((called(model.name, v), v) for v in numbers)])

    def named(self, name: str) -> Named:
        """The version that a name means now, under this name."""
        with self.database.read() as session:
            model = _resident(session)
            version = version_called(name, model.name, ledger.head(session, model.fingerprint))
            return _named(session, model, [(name, version)])[0]

    def compare(self, request: CompareRequest) -> str:
        """Ask a worker to say one prompt on two versions; the payload is the request as JSON."""
        self._check_tokens_asked(request)
        model, tokenizer, head = self._at_head()
        for version in request.versions:
            check_version(head, version, field="versions")
        check_tokens(tokenizer, request.prompt, None, model.info["positions"])
        return self._call("compare", request.model_dump(mode="json"))

    def ask_again(self, kind: str, channel: str, request: GenerateRequest | CompareRequest) -> None:
        """The same call on the same channel, because the broker has lost it: the whole answer comes anew."""
        self.broker.call(kind, request.model_dump(mode="json"), request_id.get(), channel)

    def _check_tokens_asked(
        self, request: GenerateRequest | CompareRequest, field: str = "max_new_tokens"
    ) -> None:
        most = self.settings.max_new_tokens
        if request.max_new_tokens > most:
            raise InvalidInput(f"`{field}` may be at most {most} here: ask for fewer.", field)

    def _call(self, kind: str, payload: dict[str, Any]) -> str:
        if self.broker.waiting(kind) >= self.settings.max_queue:
            raise QueueFull(f"{self.settings.max_queue} requests wait already: try again in a few seconds.")
        channel = self.broker.call(kind, payload, request_id.get())
        faults.reach("call.after")
        return channel

    def _at_head(self) -> tuple[Model, Tokenizer, int]:
        """The resident model, its tokenizer and the newest version. Every call asks this, so it is one short question."""
        with self.database.glance() as connection:
            found = connection.execute(_NEWEST).one_or_none()
        if found is None:
            raise _no_model()
        registered = found.fingerprint, found.registered
        if self._speaker is None or _registration(self._speaker[0]) != registered:
            with self.database.read() as session:
                model = _resident(session)
                self._speaker = model, self._tokenizer_of(model)
        return *self._speaker, found.head or 0

    def _tokenizer_of(self, model: Model) -> Tokenizer:
        """Its text has megabytes: it is read and parsed once for each registration of the model, in its session."""
        key = _registration(model)
        if self._tokenizer is None or self._tokenizer[0] != key:
            self._tokenizer = key, Tokenizer.from_str(model.tokenizer)
        return self._tokenizer[1]

    # the ledger

    def head(self) -> int:
        with self.database.read() as session:
            return ledger.head(session, _resident(session).fingerprint)

    def ledger(
        self,
        cursor: str | None = None,
        limit: int = 50,
        version: int | None = None,
        newest_first: bool = False,
    ) -> Resource:
        """{"items": entries, oldest first or newest first, "next", "head"}; with `version` only those up to that version."""
        check_limit(limit)
        last = read_cursor(cursor, int)
        with self.database.read() as session:
            model = _resident(session)
            if version is not None:
                check_version(ledger.head(session, model.fingerprint), version)
            if newest_first:
                before = version + 1 if last is None and version is not None else last
                found = ledger.newest(session, model.fingerprint, before, limit + 1)
            else:
                found = ledger.entries(session, model.fingerprint, last or 0, version, limit + 1)
            items = [entry.as_dict() for entry in found[:limit]]
            more = cursor_after(found[limit - 1].version) if len(found) > limit else None
            return {"items": items, "next": more, "head": ledger.head(session, model.fingerprint)}

    def verify(self) -> Resource:
        """Check the hash chain, the factors, the statuses and what the replicas say of their weights."""
        with self.database.read(long=True) as session:
            model = _resident(session).fingerprint
            findings = [asdict(finding) for finding in verify(session, model)]
            rows = select(Attestation).where(Attestation.model == model)
            count = select(func.count()).where(LedgerEntry.model == model)
            return {
                "ok": not findings,
                "findings": findings,
                "entries": session.scalar(count),
                "head": ledger.head(session, model),
                "replicas": [
                    {
                        "worker": r.worker,
                        "version": r.version,
                        "digest": r.digest,
                        "device": r.device,
                        "at": ledger.moment(r.at),
                        "withdrawn": ledger.moment(r.withdrawn) if r.withdrawn else None,
                    }
                    for r in session.scalars(rows.order_by(Attestation.version, Attestation.worker))
                ],
            }

    # what jobs of every kind share

    def _known(self, actor: str, idempotency: Idempotency | None) -> list[Resource] | None:
        """What this key made before, if anything."""
        if idempotency is None:
            return None
        key, fingerprint = idempotency
        if not 0 < len(key) <= MAX_KEY:
            raise InvalidInput(f"an Idempotency-Key has 1 to {MAX_KEY} characters.", "Idempotency-Key")
        with self.database.read() as session:
            row = session.get(IdempotencyKey, (actor, key))
            if row is None:
                return None
            if row.fingerprint != fingerprint:
                raise InvalidInput(
                    "this Idempotency-Key came with another body before: use a new key for a new request.",
                    "Idempotency-Key",
                )
            jobs = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(row.resources)))}
            return resources.several(session, [jobs[job_id] for job_id in row.resources])

    def _submit(
        self,
        jobs: list[dict[str, Any]],
        model: Model,
        actor: str,
        idempotency: Idempotency | None,
        max_queued: int | None,
        kept: Mapping[str, Mapping[str, bytes]] | None = None,
    ) -> list[Resource]:
        """`kept`: the parts that jobs begin with, by their ids."""
        try:
            with self.database.session() as session:
                if idempotency is not None:
                    _remember(session, actor, idempotency, [job["id"] for job in jobs])
                rows = self._add(session, jobs, model, actor, max_queued, kept or {})
                made_resources = resources.several(session, rows)
                faults.reach("job.before_commit")
        except IntegrityError:  # the same key came in beside us, and was first
            known = self._known(actor, idempotency)
            if known is None:
                raise
            return known
        self._ring(jobs)
        return made_resources

    def _add(
        self,
        session: Session,
        jobs: Sequence[dict[str, Any]],
        model: Model,
        actor: str,
        max_queued: int | None,
        kept: Mapping[str, Mapping[str, bytes]],
    ) -> list[Job]:
        """Rows for jobs for which there is room, and the parts that they begin with."""
        self._check_room(session, model, actor, len(jobs), max_queued)
        rows = [Job(**job) for job in jobs]
        session.add_all(rows)
        session.flush()
        for job_id, named in kept.items():
            for name, data in named.items():
                parts.put(session, job_id, name, data)
        return rows

    def _ring(self, jobs: Sequence[dict[str, Any]]) -> None:
        """The bell for jobs that are committed."""
        faults.reach("job.after_commit")
        for job in jobs:
            with told(job["id"]):
                self.broker.announce(job["id"], job["kind"])
        faults.reach("job.after_announce")

    def _check_room(
        self, session: Session, model: Model, actor: str, more: int, max_queued: int | None
    ) -> None:
        """Room for all, and room for this actor; requests that come at the same moment may find the same room."""
        everyone = and_(Job.model == model.fingerprint, Job.status == "queued")
        limit = self.settings.max_queued if max_queued is None else max_queued
        _check_count(session, everyone, more, self.settings.max_queue, "jobs wait already")
        _check_count(session, and_(everyone, Job.actor == actor), more, limit, "jobs of yours wait already")

    def _job(self, kind: str, job_id: str) -> Resource:
        with self.database.read() as session:
            return resources.resource(session, _found(session, kind, job_id))

    def _jobs(self, kind: str, cursor: str | None, limit: int, **equal: str | None) -> Resource:
        check_limit(limit)
        before = read_cursor(cursor, str)
        with self.database.read() as session:
            query = select(Job) if kind != "evaluation" else _lean(Job.result)
            query = query.where(Job.model == _resident(session).fingerprint, Job.kind == kind)
            for name, value in equal.items():
                if value is not None:
                    query = query.where(getattr(Job, name) == value)
            if before is not None:
                query = query.where(Job.id < before)
            found = list(session.scalars(query.order_by(Job.id.desc()).limit(limit + 1)))
            more = cursor_after(found[limit - 1].id) if len(found) > limit else None
            return {"items": resources.listed(session, found[:limit]), "next": more}

    def _take_back(self, kind: str, job_id: str, actor: str) -> Resource:
        with self.database.session() as session:
            found = _found(session, kind, job_id)
            ledger.lock(
                session, found.model
            )  # always before the row of a job, as `Desk.apply` does: no deadlock
            job = _held(session, found)
            before = job.status
            _undo(session, job, actor)
            answer = resources.resource(session, job)
            faults.reach("revert.before_commit")
        faults.reach("revert.after_commit")
        with told(job_id):
            self._tell_undone(before, answer)
        return answer

    def _tell_undone(self, before: str, job: Resource) -> None:
        if before == "queued":
            metrics.JOBS_ENDED.labels(kind_of(job["id"]), job["status"]).inc()
            self.broker.publish(job["id"], "end", job, last=True)
        elif before == "running":
            self.broker.cancel(job["id"])
        elif job["status"] != before:
            self.broker.wake()  # workers move to the new head


def _check_count(session: Session, which: ColumnElement[bool], more: int, limit: int, what: str) -> None:
    already = session.scalar(select(func.count()).select_from(Job).where(which)) or 0
    if already + more > limit:
        raise QueueFull(f"{already} {what} and at most {limit} may: try again later, or with fewer.")


def _tried(ask: Callable[[], T], reasons: list[str]) -> T | None:
    """What a dependency says, or the reason why it says nothing."""
    try:
        return ask()
    except Unavailable as error:
        reasons += error.extra.get("reasons", [error.detail.rstrip(".")])
        return None


def _unready(listed: Sequence[Worker], due: int, waiting: dict[str, int]) -> list[str]:
    """Why the service is not ready: nobody lives, nobody speaks at head, or work waits that nobody does."""
    if not workers.serving(listed):
        return ["no worker is alive"]
    reasons = []
    speaking = workers.serving(listed, "generate")
    if not speaking:
        reasons.append("no living worker does generate")
    elif all(worker.version < due for worker in speaking):
        reasons.append(f"no worker has reached version {due} yet")
    for role, kinds in workers.ROLES.items():
        count = sum(waiting.get(kind, 0) for kind in kinds)
        if count and role != "generate" and not workers.serving(listed, role):
            reasons.append(f"{count} jobs wait and no living worker does {role}")
    return reasons


# rows


def _resident(session: Session) -> Model:
    """The model that a worker came up with last."""
    model = session.scalar(select(Model).order_by(Model.registered.desc()).limit(1))
    if model is None:
        raise _no_model()
    return model


def _named(session: Session, model: Model, names: Sequence[tuple[str, int]]) -> list[Named]:
    """Names and the versions that they mean; the ledger knows what each is and since when."""
    known = select(LedgerEntry.version, LedgerEntry.state, LedgerEntry.at).where(
        LedgerEntry.model == model.fingerprint, LedgerEntry.version.in_({version for _, version in names})
    )
    made = {row.version: (row.state, row.at) for row in session.execute(known)}
    made[0] = ledger.state_of(model.fingerprint, []), model.created
    return [Named(name, version, *made[version]) for name, version in names]


def _no_model() -> Unavailable:
    return Unavailable(
        "no worker has loaded a model yet: ask again when one says that it is ready, or start one.",
        reasons=["no worker has loaded a model yet"],
    )


def _registration(model: Model) -> tuple[str, datetime]:
    return model.fingerprint, model.registered


#: which model is resident, since which registration, and its newest version
_NEWEST = (
    select(
        Model.fingerprint,
        Model.registered,
        select(func.max(LedgerEntry.version))
        .where(LedgerEntry.model == Model.fingerprint)
        .scalar_subquery()
        .label("head"),
    )
    .order_by(Model.registered.desc())
    .limit(1)
)


def _active(model: Model) -> tuple[ColumnElement[bool], ...]:
    applied = (Job.kind == "edit", Job.status == "applied", Job.version.is_not(None))
    return Job.model == model.fingerprint, *applied


def _waiting(session: Session, model: Model) -> dict[str, int]:
    """Queued jobs by kind."""
    queued = and_(Job.model == model.fingerprint, Job.status == "queued")
    return dict.fromkeys(JOBS, 0) | _counted(session, Job.kind, queued)


def _counts(session: Session, model: Model) -> dict[str, int]:
    """How many jobs wait, run, and were given up."""
    wanted = or_(Job.status.in_(OPEN), and_(Job.status == "failed", Job.dead))
    found = _counted(session, Job.status, and_(Job.model == model.fingerprint, wanted))
    names = {"queued": "queued", "running": "running", "dead": "failed"}
    return {name: found.get(status, 0) for name, status in names.items()}


def _counted(session: Session, column: Any, which: ColumnElement[bool]) -> dict[str, int]:
    rows = session.execute(select(column, func.count()).where(which).group_by(column))
    return {str(value): count for value, count in rows}


def _found(session: Session, kind: str | None, job_id: str) -> Job:
    job = session.get(Job, job_id) if job_id.isascii() and "\x00" not in job_id else None
    if job is None or kind not in (None, job.kind):
        raise NotFound(f"there is no {kind or 'job'} {job_id!r}.")
    return job


def _held(session: Session, job: Job) -> Job:
    """The job as it is now, kept from all others until the transaction ends."""
    row = select(Job).where(Job.id == job.id).with_for_update()
    return session.scalars(row.execution_options(populate_existing=True)).one()


def _undo(session: Session, job: Job, actor: str) -> None:
    """Take a job back, as far as it has come."""
    if job.status == "queued":
        job.status, job.ended, job.updated = "cancelled", now(), now()
        parts.drop(session, job)
    elif job.status == "running":
        job.cancel_requested, job.updated = True, now()
    elif job.status in ("applied", "superseded") and job.version is not None:
        ledger.append(session, job.model, ledger.REVERT, job, actor, _revert_body(job))
    session.flush()


def _job(kind: str, model: Model, request: dict[str, Any], actor: str) -> dict[str, Any]:
    at = now()
    row = {
        "id": new_id(kind),
        "kind": kind,
        "model": model.fingerprint,
        "status": "queued",
        "request": request,
    }
    asked = {"actor": actor, "request_id": request_id.get() or None}
    return row | asked | {"created": at, "updated": at, "attempts": 0}


def _edit_job(model: Model, request: EditRequest, actor: str) -> dict[str, Any]:
    return _job("edit", model, request.model_dump(mode="json"), actor) | {
        "subject": words(request.subject),
        "fact_key": fact_key(request.subject, request.prompt),
        "dry_run": request.dry_run,
    }


def _remember(session: Session, actor: str, idempotency: Idempotency, made: Sequence[str]) -> None:
    """What a key has made. Raises IntegrityError when it came in beside us, and was first."""
    key, fingerprint = idempotency
    row = {"resources": list(made), "status_code": 202, "created": now()}
    session.add(IdempotencyKey(actor=actor, key=key, fingerprint=fingerprint, **row))
    session.flush()


# export and import


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


def _here(session: Session, model: Model, given: Sequence[Given]) -> dict[tuple[str, str], str]:
    """Of edits of a file those that have landed here and were not reverted, or are about to: their names -> ids here."""
    subjects = {words(g.request.subject) for g in given}
    known = (
        select(Job.id, Job.fact_key, Job.request, Factors.sha256)
        .outerjoin(Factors, Factors.edit_id == Job.id)
        .where(
            Job.model == model.fingerprint,
            Job.kind == "edit",
            Job.subject.in_(subjects),
            Job.status.in_((*OPEN, "applied", "superseded")),
        )
        .order_by(Job.id)
    )
    wanted = {g.name for g in given}
    found: dict[tuple[str, str], str] = {}
    for row in session.execute(known):
        name = row.fact_key, row.sha256 or (row.request.get("origin") or {}).get("factors_sha256")
        if name in wanted:
            found.setdefault(name, row.id)
    return found


def _given_job(model: Model, given: Given, actor: str) -> dict[str, Any]:
    job = _edit_job(model, given.request, actor)
    return job | {"request": {**job["request"], "origin": given.origin}}


def _parts_of(given: Given) -> dict[str, bytes]:
    return {parts.FACTORS: given.factors, parts.BODY: json.dumps(given.body).encode()}


def _lean(*heavy: InstrumentedAttribute[Any]) -> Select[Job]:
    """Jobs without these columns, for a list: each can be megabytes."""
    return select(Job).options(*map(defer, heavy))


def _revert_body(job: Job) -> dict[str, Any]:
    return {
        "subject": job.request["subject"],
        "prompt": job.request["prompt"],
        "applied_version": job.version,
    }


def _older(session: Session, last: str | None) -> tuple[ColumnElement[bool], ...]:
    """What comes after a job in a list of all kinds, whose ids do not sort by time together."""
    if last is None:
        return ()
    job = session.get(Job, last)
    if job is None:
        raise strange_cursor()
    return (or_(Job.created < job.created, and_(Job.created == job.created, Job.id < job.id)),)

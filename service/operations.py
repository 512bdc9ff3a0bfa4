"""The verbs of the house: what the doors call. Each is one transaction, and free of torch.

Everything is checked before anything is written; what is announced is committed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from tokenizers import Tokenizer

from service.editors.recipes import Recipe, resolve
from service.errors import Conflict, InvalidInput, NotFound, QueueFull, Unavailable
from service.ids import new_id
from service.jobs import resources
from service.jobs.broker import Broker, Event
from service.jobs.desk import LEASE
from service.jobs.resources import EDIT_STATUSES, OPEN, Resource
from service.ledger import ledger
from service.ledger.verify import verify
from service.requests import CompareRequest, EditRequest, GenerateRequest, TraceRequest, Version
from service.settings import Settings
from service.store.database import Database
from service.store.tables import Attestation, Factors, IdempotencyKey, Job, LedgerEntry, Model, Worker, now
from service.text import check_tokens, fact_key, fill, token_span

#: an Idempotency-Key and a fingerprint of the body that came with it
Idempotency = tuple[str, str]
#: what a cursor holds: the last id or version of the page before
Last = TypeVar("Last", str, int)

MAX_PAGE = 200
MAX_KEY = 255
NOISE = re.compile(r"\d+(\.\d+)?sigma")


class Operations:
    """All methods but `events` block on the database: call them from a thread. Safe to share between threads."""

    def __init__(self, database: Database, broker: Broker, settings: Settings) -> None:
        self.database = database
        self.broker = broker
        self.settings = settings

    # models

    def model(self) -> Resource:
        """The resident model: its fingerprint, name, head, active_edits and workers, and all of its info."""
        with self.database.read() as session:
            model = _resident(session)
            active = select(func.count()).where(
                Job.model == model.fingerprint,
                Job.kind == "edit",
                Job.status == "applied",
                Job.version.is_not(None),
            )
            return {
                **model.info,
                "fingerprint": model.fingerprint,
                "name": model.name,
                "head": ledger.head(session, model.fingerprint),
                "active_edits": session.scalar(active),
                "workers": [_worker(worker) for worker in _living(session, model)],
                "created": ledger.moment(model.created),
            }

    def models(self) -> list[Resource]:
        """The resident model as a list of one."""
        return [self.model()]

    def ready(self) -> Resource:
        """What is up; raises Unavailable, whose `extra["reasons"]` lists all that is not."""
        with self.database.read() as session:
            model = _resident(session)
            workers = _living(session, model)
            head = ledger.head(session, model.fingerprint)
            settled = select(func.max(LedgerEntry.version)).where(
                LedgerEntry.model == model.fingerprint, LedgerEntry.at < now() - timedelta(seconds=LEASE)
            )
            due = session.scalar(settled) or 0  # the newest version that a worker has had time to reach
        reasons = []
        if not workers:
            reasons.append("no worker is alive")
        elif all(worker.version < due for worker in workers):
            reasons.append(f"no worker has reached version {due} yet")
        try:
            waiting = {kind: self.broker.waiting(kind) for kind in ("generate", "edit", "trace")}
        except (OSError, Unavailable) as error:
            reasons.append(f"the queue does not answer: {error}")
        if reasons:
            raise Unavailable("; ".join(reasons) + ".", reasons=reasons)
        return {
            "ready": True,
            "head": head,
            "workers": [_worker(worker) for worker in workers],
            "waiting": waiting,
        }

    # edits

    def submit_edits(
        self, requests: Sequence[EditRequest], actor: str, idempotency: Idempotency | None = None
    ) -> list[Resource]:
        """Queue edits, all or none. The same key and body again gives the same edits again."""
        if (known := self._known(actor, idempotency)) is not None:
            return known
        with self.database.read() as session:
            model = _resident(session)
        for number, request in enumerate(requests):
            with _field(f"edits.{number}" if len(requests) > 1 else ""):
                check_edit(request, model)
        jobs = [
            _job("edit", model, request.model_dump(mode="json"), actor)
            | {
                "subject": _words(request.subject),
                "fact_key": fact_key(request.subject, request.prompt),
                "dry_run": request.dry_run,
            }
            for request in requests
        ]
        return self._submit(jobs, model, actor, idempotency)

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
            "edit", cursor, limit, status=status, subject=None if subject is None else _words(subject)
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
        self, request: TraceRequest, actor: str, idempotency: Idempotency | None = None
    ) -> Resource:
        if (known := self._known(actor, idempotency)) is not None:
            return known[0]
        with self.database.read() as session:
            model = _resident(session)
            _check_version(session, model, request.version)
        check_trace(request, model)
        job = _job("trace", model, request.model_dump(mode="json"), actor) | {
            "subject": _words(request.subject)
        }
        return self._submit([job], model, actor, idempotency)[0]

    def trace(self, trace_id: str) -> Resource:
        return self._job("trace", trace_id)

    def traces(self, cursor: str | None = None, limit: int = 50) -> Resource:
        """{"items": newest first, "next": cursor or None}."""
        return self._jobs("trace", cursor, limit)

    def cancel_trace(self, trace_id: str) -> Resource:
        """Stop a trace that waits or runs; harmless when it has ended."""
        return self._take_back("trace", trace_id, "")

    # any job

    async def events(self, job_id: str, after: str | None = None) -> AsyncIterator[Event]:
        """Progress, then a last event "end" with the resource. A job that has ended gives its end at once."""
        ended = await asyncio.to_thread(self._ended, job_id)
        if ended is not None:
            yield ended
            return
        async for event in self.broker.events(job_id, after):
            yield event

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
        with self.database.read() as session:
            model = _resident(session)
            _check_version(session, model, request.version, request.min_version)
        for text in request.texts():
            check_tokens(_tokenizer(model.tokenizer), text, None, model.info["positions"])
        return self._call("generate", request.model_dump(mode="json"))

    def compare(self, request: CompareRequest) -> str:
        """Ask a worker to say one prompt on two versions; the payload is the request as JSON."""
        with self.database.read() as session:
            model = _resident(session)
            for version in request.versions:
                _check_version(session, model, version, field="versions")
        check_tokens(_tokenizer(model.tokenizer), request.prompt, None, model.info["positions"])
        return self._call("compare", request.model_dump(mode="json"))

    def _call(self, kind: str, payload: dict[str, Any]) -> str:
        if self.broker.waiting(kind) >= self.settings.max_queue:
            raise QueueFull(f"{self.settings.max_queue} requests wait already: try again in a few seconds.")
        return self.broker.call(kind, payload)

    # the ledger

    def head(self) -> int:
        with self.database.read() as session:
            return ledger.head(session, _resident(session).fingerprint)

    def ledger(self, cursor: str | None = None, limit: int = 50, version: int | None = None) -> Resource:
        """{"items": entries, oldest first, "next", "head"}; with `version` only those up to that version."""
        _check_limit(limit)
        after = _read_cursor(cursor, int) or 0
        with self.database.read() as session:
            model = _resident(session)
            if version is not None:
                _check_version(session, model, version)
            found = ledger.entries(session, model.fingerprint, after, version, limit + 1)
            items = [entry.as_dict() for entry in found[:limit]]
            more = _cursor(found[limit - 1].version) if len(found) > limit else None
            return {"items": items, "next": more, "head": ledger.head(session, model.fingerprint)}

    def verify(self) -> Resource:
        """Check the hash chain, the factors, the statuses and what the replicas say of their weights."""
        with self.database.read() as session:
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
            return _resources(session, [jobs[job_id] for job_id in row.resources])

    def _submit(
        self, jobs: list[dict[str, Any]], model: Model, actor: str, idempotency: Idempotency | None
    ) -> list[Resource]:
        try:
            with self.database.session() as session:
                if idempotency is not None:
                    key, fingerprint = idempotency
                    made = {"resources": [job["id"] for job in jobs], "status_code": 202, "created": now()}
                    session.add(IdempotencyKey(actor=actor, key=key, fingerprint=fingerprint, **made))
                    session.flush()
                self._check_room(session, model, len(jobs))
                rows = [Job(**job) for job in jobs]
                session.add_all(rows)
                session.flush()
                made_resources = _resources(session, rows)
        except IntegrityError:  # the same key came in beside us, and was first
            known = self._known(actor, idempotency)
            if known is None:
                raise
            return known
        for job in jobs:
            self.broker.announce(job["id"], job["kind"])
        return made_resources

    def _check_room(self, session: Session, model: Model, more: int) -> None:
        waiting = select(func.count()).where(Job.model == model.fingerprint, Job.status == "queued")
        already = session.scalar(waiting) or 0
        if already + more > self.settings.max_queue:
            raise QueueFull(
                f"{already} jobs wait already and at most {self.settings.max_queue} may: try again later, or with fewer."
            )

    def _job(self, kind: str, job_id: str) -> Resource:
        with self.database.read() as session:
            return resources.resource(session, _found(session, kind, job_id))

    def _jobs(self, kind: str, cursor: str | None, limit: int, **equal: str | None) -> Resource:
        _check_limit(limit)
        before = _read_cursor(cursor, str)
        with self.database.read() as session:
            query = select(Job).where(Job.model == _resident(session).fingerprint, Job.kind == kind)
            for name, value in equal.items():
                if value is not None:
                    query = query.where(getattr(Job, name) == value)
            if before is not None:
                query = query.where(Job.id < before)
            found = list(session.scalars(query.order_by(Job.id.desc()).limit(limit + 1)))
            more = _cursor(found[limit - 1].id) if len(found) > limit else None
            return {"items": _resources(session, found[:limit]), "next": more}

    def _take_back(self, kind: str, job_id: str, actor: str) -> Resource:
        with self.database.session() as session:
            model = _found(session, kind, job_id).model
            ledger.lock(session, model)  # always before the row of a job, as `Desk.apply` does: no deadlock
            job = session.scalars(
                select(Job)
                .where(Job.id == job_id)
                .with_for_update()
                .execution_options(populate_existing=True)
            ).one()
            before = job.status
            if before == "queued":
                job.status, job.ended, job.updated = "cancelled", now(), now()
            elif before == "running":
                job.cancel_requested, job.updated = True, now()
            elif before in ("applied", "superseded") and job.version is not None:
                ledger.append(session, model, ledger.REVERT, job, actor, _revert_body(job))
            session.flush()
            answer = resources.resource(session, job)
        if before == "queued":
            self.broker.publish(job_id, "end", answer, last=True)
        elif before == "running":
            self.broker.cancel(job_id)
        elif answer["status"] != before:
            self.broker.wake()  # workers move to the new head
        return answer


# checks


def check_edit(request: EditRequest, model: Model) -> None:
    """All that can be known of an edit without computing it."""
    tokenizer, positions = _tokenizer(model.tokenizer), model.info["positions"]
    statement = fill(request.prompt, request.subject)
    _check_target(tokenizer, statement.text, request.target_new, positions, "target_new")
    if request.target_true is not None:
        _check_target(tokenizer, statement.text, request.target_true, positions, "target_true")
    token_span(tokenizer.encode(statement.text).offsets, statement.span)
    for number, prompt in enumerate(request.probes.paraphrase):
        with _field(f"probes.paraphrase.{number}"):
            text = fill(prompt, request.subject).text if "{}" in prompt else prompt
            check_tokens(tokenizer, text, request.target_new, positions)
    for number, neighbour in enumerate(request.probes.neighborhood):
        with _field(f"probes.neighborhood.{number}"):
            check_tokens(tokenizer, neighbour.prompt, neighbour.target, positions)
    recipe = Recipe.model_validate(model.info["recipe"]) if model.info.get("recipe") else None
    resolve(recipe, request.hparams, model.info["layers"])


def check_trace(request: TraceRequest, model: Model) -> None:
    """All that can be known of a trace without running it."""
    tokenizer = _tokenizer(model.tokenizer)
    text, span = request.located()
    check_tokens(tokenizer, text, request.target, model.info["positions"])
    token_span(tokenizer.encode(text).offsets, span)
    noise = request.noise
    if isinstance(noise, str) and not NOISE.fullmatch(noise):
        raise InvalidInput(
            '`noise` is a number, or a multiple of the embeddings\' deviation such as "3sigma".', "noise"
        )
    if isinstance(noise, float) and not 0 <= noise < float("inf"):
        raise InvalidInput("`noise` must not be negative, and finite.", "noise")


def _check_target(tokenizer: Tokenizer, text: str, target: str, positions: int, field: str) -> None:
    try:
        check_tokens(tokenizer, text, target, positions)
    except InvalidInput as error:
        raise InvalidInput(error.detail, field if error.field == "target" else error.field) from None


def _check_version(
    session: Session, model: Model, version: Version, least: int | None = None, field: str = "version"
) -> None:
    head = ledger.head(session, model.fingerprint)
    number = {"head": head, "base": 0}.get(version, version) if isinstance(version, str) else version
    if not isinstance(number, int) or not 0 <= number <= head:
        raise InvalidInput(
            f"there is no version {version}: the newest is {head}, the base model is 0.", field
        )
    if least is not None and least > head:
        raise InvalidInput(f"there is no version {least} yet: the newest is {head}.", "min_version")
    if least is not None and least > number:
        raise InvalidInput(f"version {number} is older than the `min_version` {least}.", "min_version")


@contextmanager
def _field(place: str) -> Iterator[None]:
    """Errors inside name the part of the request that they speak of."""
    try:
        yield
    except InvalidInput as error:
        names = [name for name in (place, error.field) if name]
        raise InvalidInput(error.detail, ".".join(names), **error.extra) from None


@lru_cache(maxsize=4)
def _tokenizer(serialized: str) -> Tokenizer:
    return Tokenizer.from_str(serialized)


# rows


def _resident(session: Session) -> Model:
    """The model that a worker came up with last."""
    model = session.scalar(select(Model).order_by(Model.registered.desc()).limit(1))
    if model is None:
        raise Unavailable("no worker has loaded a model yet.", reasons=["no worker has loaded a model yet"])
    return model


def _living(session: Session, model: Model) -> list[Worker]:
    alive = Worker.heartbeat >= now() - timedelta(seconds=LEASE)
    return list(
        session.scalars(select(Worker).where(Worker.model == model.fingerprint, alive).order_by(Worker.id))
    )


def _worker(worker: Worker) -> Resource:
    return {
        "id": worker.id,
        "version": worker.version,
        "digest": worker.digest,
        "roles": worker.roles,
        "heartbeat": ledger.moment(worker.heartbeat),
        "started": ledger.moment(worker.started),
    }


def _found(session: Session, kind: str, job_id: str) -> Job:
    job = session.get(Job, job_id) if job_id.isascii() and "\x00" not in job_id else None
    if job is None or job.kind != kind:
        raise NotFound(f"there is no {kind} {job_id!r}.")
    return job


def _job(kind: str, model: Model, request: dict[str, Any], actor: str) -> dict[str, Any]:
    at = now()
    row = {
        "id": new_id(kind),
        "kind": kind,
        "model": model.fingerprint,
        "status": "queued",
        "request": request,
    }
    return row | {"actor": actor, "created": at, "updated": at, "attempts": 0}


def _resources(session: Session, jobs: Sequence[Job]) -> list[Resource]:
    if jobs and jobs[0].kind == "edit":
        return resources.edits(session, jobs)
    return [resources.trace(job) for job in jobs]


def _revert_body(job: Job) -> dict[str, Any]:
    return {
        "subject": job.request["subject"],
        "prompt": job.request["prompt"],
        "applied_version": job.version,
    }


def _words(text: str) -> str:
    return " ".join(text.split())


# pages


def _check_limit(limit: int) -> None:
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidInput(f"`limit` must be from 1 to {MAX_PAGE}.", "limit")


def _cursor(last: str | int) -> str:
    return base64.urlsafe_b64encode(json.dumps(last).encode()).decode().rstrip("=")


def _read_cursor(cursor: str | None, kind: type[Last]) -> Last | None:
    if cursor is None:
        return None
    try:
        last = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError):
        last = None
    odd = isinstance(last, str) and not (last.isascii() and "\x00" not in last)
    huge = isinstance(last, int) and not 0 <= last < 2**63
    if type(last) is not kind or odd or huge:
        raise InvalidInput("this cursor is not one that this list gave: start without one.", "cursor")
    return last

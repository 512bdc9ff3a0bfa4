"""Which steps a kind of job takes. Each task ends its own job at the desk; what it raises, the engine reports."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from hashlib import sha256
from tempfile import SpooledTemporaryFile

from service.datasets.records import facts_beside, read
from service.editing.context import Toolkit
from service.editing.edit_job import edits_steps
from service.engine.calls import pinned
from service.engine.versioned_model import Replica
from service.errors import InvalidInput
from service.evaluation.runner import evaluate_steps
from service.exporting.export_job import export_steps
from service.jobs import artifacts
from service.jobs.broker import JOBS
from service.jobs.job_store import Desk, RunningJob
from service.kit.artifact_store import get_json
from service.kit.steps import Progress, Steps, Working, persist
from service.kit.text import Statement
from service.schemas import MAX_RECORDS, EvaluationRequest, ExportRequest, TraceRequest
from service.tracing.fast_trace import trace_steps
from workers.job_metrics import timed

Tasks = dict[str, Callable[..., Working]]
SPOOL = 2**24  # bytes of an export that are held in memory
PIECE = 2**22  # bytes of an export that go to the store at once


def tasks(replica: Replica, desk: Desk, toolkit: Toolkit, kinds: Collection[str] = JOBS) -> Tasks:
    """Kind of job -> the steps of one (of an edit: of several together), for those that are asked for."""

    def edit(*jobs: RunningJob) -> Working:
        return timed(jobs, edits_steps(replica, desk, jobs, toolkit))

    def trace(job: RunningJob) -> Working:
        return timed([job], traced(replica, desk, job))

    def evaluation(job: RunningJob) -> Working:
        return timed([job], evaluated(replica, desk, toolkit, job))

    def export(job: RunningJob) -> Working:
        return timed([job], exported(replica, desk, toolkit, job))

    known: Tasks = {"edit": edit, "trace": trace, "export": export, "evaluation": evaluation}
    return {kind: steps for kind, steps in known.items() if kind in kinds}


def traced(replica: Replica, desk: Desk, job: RunningJob) -> Steps[None]:
    """A causal trace at the version that "head" means when the job begins."""
    request = TraceRequest.model_validate(job.request)
    version = pinned(request.version, replica.head())
    text, span = request.located()
    steps = trace_steps(
        replica.base,
        Statement(text, span),
        request.target,
        kinds=request.kinds,
        window=request.window,
        samples=request.samples,
        noise=request.noise,
        severed=request.severed,
        seed=request.seed,
        compat=request.compat,
    )
    result = yield from replica.standing(replica.weights(version), steps)
    yield from persist(partial(desk.finish, job, "done", {**result.to_json(), "version": version}))


class AtTheDesk:
    """What a job keeps as it goes, where whoever goes on with it finds it."""

    def __init__(self, desk: Desk, job: RunningJob) -> None:
        self._desk, self._job = desk, job

    def get(self, name: str) -> bytes | None:
        return self._desk.kept(self._job, name)

    def put(self, name: str, data: bytes) -> None:
        self._desk.keep(self._job, name, data)


def evaluated(replica: Replica, desk: Desk, toolkit: Toolkit, job: RunningJob) -> Steps[None]:
    """An evaluation of edits of the base model. An attempt goes on where the one before it was when its worker died."""
    kept = AtTheDesk(desk, job)
    rows = get_json(kept, artifacts.RECORDS)
    request = EvaluationRequest.model_validate({**job.request, "records": rows})
    source = rows if rows is not None else facts_beside(toolkit.model.folder)
    if source is None:
        raise InvalidInput("the resident model has no table of facts beside it.", "dataset")
    reading = read(source, request.seed, request.limit or MAX_RECORDS)
    result = yield from evaluate_steps(replica, toolkit, request.plan(), reading.records, kept)
    result["records"] |= {"form": reading.form, "skipped": reading.skipped}
    yield from persist(partial(desk.finish, job, "done", result))


def exported(replica: Replica, desk: Desk, toolkit: Toolkit, job: RunningJob) -> Steps[None]:
    """An export, made here and kept in pieces where every API finds them."""
    request = ExportRequest.model_validate(job.request)
    with SpooledTemporaryFile(SPOOL) as file:
        told = yield from export_steps(replica, toolkit.reference, request, file)
        size, digest = file.tell(), sha256()
        count = -(-size // PIECE)
        file.seek(0)
        for number in range(count):
            data = file.read(PIECE)
            digest.update(data)
            yield from persist(partial(desk.keep, job, artifacts.piece(number), data))
            yield Progress("store", number + 1, count)
    result = {**told, "bytes": size, "sha256": digest.hexdigest(), "pieces": count}
    yield from persist(partial(desk.finish, job, "done", result))

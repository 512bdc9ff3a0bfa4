"""The handlers of the kinds of jobs. Each writes the end of its job; the engine writes the errors that it raises."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from hashlib import sha256
from tempfile import SpooledTemporaryFile
from typing import Any

from service.datasets.fact_table import find_facts_file
from service.datasets.loading import LoadedRecords, load_records
from service.editing.context import EditorContext
from service.editing.edit_job import run_edits
from service.engine.job_runner import JobHandler
from service.engine.versioned_model import VersionedModel
from service.errors import InvalidInput
from service.evaluation import runner
from service.exporting.export_job import export_version
from service.jobs import artifacts
from service.jobs.job_kinds import JOB_KINDS
from service.jobs.job_store import ClaimedJob, JobStore
from service.kit.artifact_store import get_json
from service.kit.steps import (
    JobReporter,
    Phase,
    Progress,
    Stepper,
    report_to,
    retry_while_unavailable,
)
from service.kit.versions import resolve_version
from service.schemas import (
    MAX_RECORDS,
    EvaluationRequest,
    TraceRequest,
    TrainingRequest,
    WorkerExportRequest,
)
from service.tracing.fast_trace import trace_statement
from service.training.scope_training import train_scope
from workers.job_metrics import with_job_metrics

JobHandlers = dict[str, JobHandler]
SPOOL_BYTES = 2**24  # bytes of an export that stay in memory
CHUNK_BYTES = 2**22  # bytes of an export that are stored as one artifact


def job_handlers(
    replica: VersionedModel,
    job_store: JobStore,
    context: EditorContext,
    kinds: Collection[str] = JOB_KINDS,
) -> JobHandlers:
    """Return the handler of each of the given kinds. The handler of edits takes several jobs, the others take one."""

    def edit(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        return run_edits(replica, job_store, context, reporter, jobs)

    def trace(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        (job,) = jobs
        return report_to(reporter, [job.id], run_trace(replica, job_store, job))

    def evaluation(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        (job,) = jobs
        return report_to(reporter, [job.id], run_evaluation(replica, job_store, context, job))

    def export(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        (job,) = jobs
        return report_to(reporter, [job.id], run_export(replica, job_store, context, job))

    def training(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        (job,) = jobs
        return report_to(reporter, [job.id], run_training(job_store, context, job))

    handlers: JobHandlers = {
        "edit": edit,
        "trace": trace,
        "export": export,
        "evaluation": evaluation,
        "training": training,
    }
    return {kind: with_job_metrics(handler) for kind, handler in handlers.items() if kind in kinds}


def run_trace(replica: VersionedModel, job_store: JobStore, job: ClaimedJob) -> Stepper[None]:
    """Run a causal trace. "head" is resolved when the job starts."""
    request = TraceRequest.model_validate(job.request)
    version = resolve_version(request.version, replica.head())
    steps = trace_statement(
        replica.base,
        request.statement,
        request.target,
        kinds=request.kinds,
        window=request.window,
        samples=request.samples,
        noise=request.noise,
        severed=request.severed,
        seed=request.seed,
        compat=request.compat,
        mentions=request.mentions,
        separator=request.separator,
    )
    patch = yield from replica.patch_in_steps(version)
    result = yield from replica.step_with_patch(patch, steps)
    yield from retry_while_unavailable(
        partial(job_store.finish, job, "done", {**result.to_json(), "version": version})
    )


class JobArtifactStore:
    """The artifacts of a job, which a later attempt reads again."""

    def __init__(self, job_store: JobStore, job: ClaimedJob) -> None:
        self._job_store, self._job = job_store, job

    def get(self, name: str) -> bytes | None:
        return self._job_store.get_artifact(self._job, name)

    def put(self, name: str, data: bytes) -> None:
        self._job_store.put_artifact(self._job, name, data)


def run_evaluation(
    replica: VersionedModel, job_store: JobStore, context: EditorContext, job: ClaimedJob
) -> Stepper[None]:
    """Evaluate edits of the base model. An attempt resumes where the previous one ended."""
    store = JobArtifactStore(job_store, job)
    rows = get_json(store, artifacts.RECORDS)
    request = EvaluationRequest.model_validate({**job.request, "records": rows})
    loaded = _load_records(context, rows, request)
    result = yield from runner.run_evaluation(replica, context, request.plan(), loaded.records, store)
    result["records"] |= {"format": loaded.format, "skipped": loaded.skipped}
    yield from retry_while_unavailable(partial(job_store.finish, job, "done", result))


def _load_records(
    context: EditorContext, rows: list[Any] | None, request: EvaluationRequest | TrainingRequest
) -> LoadedRecords:
    """Return the records of a request: those that were sent with it, or the fact table of the model."""
    source = rows if rows is not None else find_facts_file(context.model.path)
    if source is None:
        raise InvalidInput("the resident model has no facts.jsonl: send records.", "dataset")
    return load_records(source, request.seed, request.limit or MAX_RECORDS)


def run_training(job_store: JobStore, context: EditorContext, job: ClaimedJob) -> Stepper[None]:
    """Train a scope classifier on the base model. An attempt resumes where the previous one ended."""
    store = JobArtifactStore(job_store, job)
    rows = get_json(store, artifacts.RECORDS)
    request = TrainingRequest.model_validate({**job.request, "records": rows})
    records = _load_records(context, rows, request).records
    trained = yield from train_scope(context.model, records, request.plan(), store)
    yield from retry_while_unavailable(
        partial(store.put, JOB_KINDS[job.kind].result_artifact, trained.serialize())
    )
    yield from retry_while_unavailable(partial(job_store.finish, job, "done", trained.description()))
    context.classifiers.keep(trained)


def run_export(
    replica: VersionedModel, job_store: JobStore, context: EditorContext, job: ClaimedJob
) -> Stepper[None]:
    """Make an export and store it in chunks that every API can read."""
    request = WorkerExportRequest.model_validate(job.request)
    yield from context.get_corpus()
    with SpooledTemporaryFile(SPOOL_BYTES) as file:
        manifest = yield from export_version(replica, context.reference_texts, request, file)
        size, digest = file.tell(), sha256()
        count = -(-size // CHUNK_BYTES)
        file.seek(0)
        for number in range(count):
            data = file.read(CHUNK_BYTES)
            digest.update(data)
            yield from retry_while_unavailable(
                partial(job_store.put_artifact, job, artifacts.chunk_name(number), data)
            )
            yield Progress(Phase.STORE, number + 1, count)
    result = {**manifest, "bytes": size, "sha256": digest.hexdigest(), "pieces": count}
    yield from retry_while_unavailable(partial(job_store.finish, job, "done", result))

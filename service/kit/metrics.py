"""The Prometheus metrics of this process. `docs/metrics.md` explains each.

An API exposes `REGISTRY` at GET /metrics, a worker on a port of its own. The metrics that are read from the database
and the queue at a scrape are in `service/application/store_collector.py`.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.registry import Collector

from service.kit.steps import Phase

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the number of series

#: of this process: one worker, one API, or both when they are one process
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)

#: the phases of an edit with a label of their own; the others are "other"
EDIT_PHASES = (
    Phase.ANSWER,
    Phase.CONTEXTS,
    Phase.STATISTICS,
    Phase.OPTIMIZE,
    Phase.SOLVE,
    Phase.COMPOSE,
    Phase.MEASURE,
    Phase.PERPLEXITY,
    Phase.COMMIT,
)


def _counter(name: str, documentation: str, *labels: str) -> Counter:
    return Counter(f"palimpsest_{name}", documentation, labels, registry=REGISTRY)


def _histogram(name: str, documentation: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"palimpsest_{name}", documentation, labels, registry=REGISTRY, buckets=buckets)


# HTTP

HTTP_REQUESTS = _counter("http_requests_total", "requests that have ended", "route", "method", "status")
HTTP_REQUEST_SECONDS = _histogram(
    "http_request_seconds",
    "seconds from a request to the end of its response, streams and held responses included",
    "route",
    "method",
    buckets=_DURATION_BUCKETS,
)
HTTP_REQUESTS_IN_PROGRESS = Gauge(
    "palimpsest_http_requests_in_progress", "requests in progress", registry=REGISTRY
)
HTTP_REJECTED = _counter(
    "http_rejected_total",
    "requests rejected by a limit: rate, queue length, body size, uploads or connections",
    "limit",
)
HTTP_CONNECTIONS = Gauge("palimpsest_http_connections", "open connections", registry=REGISTRY)
HTTP_CONNECTIONS_CLOSED = _counter(
    "http_connections_closed_total", "connections closed by a limit or because they were malformed", "reason"
)

# jobs and deliveries

JOBS_ENDED = _counter("jobs_ended_total", "jobs that ended in this process", "kind", "status")
JOB_SECONDS = _histogram(
    "job_seconds",
    "seconds from the start of an attempt to its end, for jobs that ended without an error",
    "kind",
    buckets=_DURATION_BUCKETS,
)
EDIT_PHASE_SECONDS = _histogram(
    "edit_phase_seconds",
    "seconds of computation of one edit in each phase, without generation between its steps",
    "phase",
    buckets=_DURATION_BUCKETS,
)
LEASE_LOSSES = _counter("lease_losses_total", "deliveries lost because their lease expired")
GENERATIONS_DEAD_LETTERED = _counter(
    "generations_dead_lettered_total", "generations and comparisons dead-lettered after too many lost workers"
)

# the engine

ENGINE_STEPS = _counter("engine_steps_total", "steps of the engine loop")
ENGINE_RESTARTS = _counter("engine_restarts_total", "restarts of the engine loop after a crash")
BATCH_SIZE = _histogram("batch_size", "sequences of one decode step", buckets=_BATCH_SIZE_BUCKETS)
ENGINE_STEP_SECONDS = _histogram(
    "engine_step_seconds",
    "seconds of one step: a prefill, a decode step, a step of the running job, or steps of building a version",
    "phase",
    buckets=_STEP_BUCKETS,
)
JOB_STEP_SECONDS = _histogram(
    "job_step_seconds", "seconds of one step of a job, by its phase", "phase", buckets=_STEP_BUCKETS
)
TOKENS = _counter("tokens_total", "generated tokens")
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds",
    "seconds to the first token of a generation, since its admission or its arrival",
    "since",
    buckets=_LATENCY_BUCKETS,
)
GENERATIONS_FINISHED = _counter(
    "generations_finished_total", "generated sequences that have ended", "finish_reason"
)
VERSION_BUILD_SECONDS = _histogram(
    "version_build_seconds", "seconds of computation to build and attest a version", buckets=_DURATION_BUCKETS
)


def phase_label(phase: Phase) -> str:
    """Return the label of a phase of an edit: the phase if it is one of EDIT_PHASES, else "other"."""
    return str(phase) if phase in EDIT_PHASES else "other"


def render_metrics(*collectors: Collector) -> bytes:
    """Return the metrics of this process and of the given collectors in the Prometheus text format."""
    return b"".join(generate_latest(part) for part in (REGISTRY, *collectors))

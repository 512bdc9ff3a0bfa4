"""What this process counts and times, in the names of Prometheus; `docs/metrics.md` says what each one means.

Whoever does the work counts it here; an API exposes `REGISTRY` at GET /metrics and a worker on a port of its own. What
has to be asked of the store or the queue at the time of a scrape is `service/application/store_collector.py`.
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

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody reads

#: of this process: one worker, one API, or both when they are one process
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)

#: the phases of an edit that are told apart; every other is "other"
EDIT_PHASES = (
    "answer",
    "contexts",
    "statistics",
    "optimize",
    "solve",
    "compose",
    "measure",
    "perplexity",
    "commit",
)


def _counter(name: str, documentation: str, *labels: str) -> Counter:
    return Counter(f"palimpsest_{name}", documentation, labels, registry=REGISTRY)


def _histogram(name: str, documentation: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"palimpsest_{name}", documentation, labels, registry=REGISTRY, buckets=buckets)


# the HTTP door

HTTP_REQUESTS = _counter("http_requests_total", "requests that have ended", "route", "method", "status")
HTTP_REQUEST_SECONDS = _histogram(
    "http_request_seconds",
    "from a request to the end of its answer, streams and held answers included",
    "route",
    "method",
    buckets=_DURATION_BUCKETS,
)
HTTP_REQUESTS_IN_PROGRESS = Gauge(
    "palimpsest_http_open_requests", "requests being answered now", registry=REGISTRY
)
HTTP_REJECTED = _counter(
    "http_rejected_total", "requests refused by a limit: of rate, of waiting jobs, of size", "limit"
)

# jobs and deliveries

JOBS_ENDED = _counter("jobs_ended_total", "jobs that have ended here", "kind", "status")
JOB_SECONDS = _histogram(
    "job_seconds",
    "from the begin of an attempt to its end, of jobs that ran to their end",
    "kind",
    buckets=_DURATION_BUCKETS,
)
EDIT_PHASE_SECONDS = _histogram(
    "edit_phase_seconds",
    "own computing of one edit in each of its phases, without what was served between its steps",
    "phase",
    buckets=_DURATION_BUCKETS,
)
LEASE_LOSSES = _counter("lease_losses_total", "deliveries that a worker lost because its lease ran out")
GENERATIONS_DEAD_LETTERED = _counter(
    "calls_given_up_total", "generations and comparisons whose workers died too often"
)

# the engine

ENGINE_STEPS = _counter("loop_turns_total", "times that the engine's loop came round")
ENGINE_RESTARTS = _counter("loop_restarts_total", "times that the engine's loop fell and was started again")
BATCH_SIZE = _histogram(
    "batch_rows", "rows that decoded side by side in one step", buckets=_BATCH_SIZE_BUCKETS
)
ENGINE_STEP_SECONDS = _histogram(
    "decode_step_seconds",
    "one forward pass: of new prompts, or of one token more",
    "reads",
    buckets=_STEP_BUCKETS,
)
TOKENS = _counter("tokens_total", "tokens that were generated")
TIME_TO_FIRST_TOKEN = _histogram(
    "first_token_seconds",
    "until a generation has its first token, since it was admitted or since it arrived",
    "since",
    buckets=_LATENCY_BUCKETS,
)
GENERATIONS_FINISHED = _counter("answers_total", "prompts whose generation has ended", "finish_reason")
VERSION_BUILD_SECONDS = _histogram(
    "version_build_seconds", "building the weights of a version", buckets=_DURATION_BUCKETS
)


def phase_label(phase_name: str) -> str:
    """A phase of an edit as a label: one of `PHASES` or "other", so that the series stay few."""
    return phase_name if phase_name in EDIT_PHASES else "other"


def render_metrics(*collectors: Collector) -> bytes:
    """All that is counted here, and what these collectors find out now, in the text format of Prometheus."""
    return b"".join(generate_latest(part) for part in (REGISTRY, *collectors))

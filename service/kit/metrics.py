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

_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_WAITED = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

#: the phases of an edit that are told apart; every other is "other"
PHASES = ("answer", "contexts", "statistics", "optimise", "solve", "compose", "measure", "perplexity", "land")


def _counter(name: str, meaning: str, *labels: str) -> Counter:
    return Counter(f"palimpsest_{name}", meaning, labels, registry=REGISTRY)


def _histogram(name: str, meaning: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"palimpsest_{name}", meaning, labels, registry=REGISTRY, buckets=buckets)


# the HTTP door

REQUESTS = _counter("http_requests_total", "requests that have ended", "route", "method", "status")
REQUEST_SECONDS = _histogram(
    "http_request_seconds",
    "from a request to the end of its answer, streams and held answers included",
    "route",
    "method",
    buckets=_LONG,
)
OPEN_REQUESTS = Gauge("palimpsest_http_open_requests", "requests being answered now", registry=REGISTRY)
REJECTED = _counter(
    "http_rejected_total", "requests refused by a limit: of rate, of waiting jobs, of size", "limit"
)

# jobs and deliveries

JOBS_ENDED = _counter("jobs_ended_total", "jobs that have ended here", "kind", "status")
JOB_SECONDS = _histogram(
    "job_seconds",
    "from the begin of an attempt to its end, of jobs that ran to their end",
    "kind",
    buckets=_LONG,
)
EDIT_SECONDS = _histogram(
    "edit_phase_seconds",
    "own computing of one edit in each of its phases, without what was served between its steps",
    "phase",
    buckets=_LONG,
)
LEASE_LOSSES = _counter("lease_losses_total", "deliveries that a worker lost because its lease ran out")
CALLS_GIVEN_UP = _counter("calls_given_up_total", "generations and comparisons whose workers died too often")

# the engine

TURNS = _counter("loop_turns_total", "times that the engine's loop came round")
RESTARTS = _counter("loop_restarts_total", "times that the engine's loop fell and was started again")
BATCH_ROWS = _histogram("batch_rows", "rows that decoded side by side in one step", buckets=_ROWS)
STEP_SECONDS = _histogram(
    "decode_step_seconds", "one forward pass: of new prompts, or of one token more", "reads", buckets=_QUICK
)
TOKENS = _counter("tokens_total", "tokens that were generated")
FIRST_TOKEN_SECONDS = _histogram(
    "first_token_seconds",
    "until a generation has its first token, since it was admitted or since it arrived",
    "since",
    buckets=_WAITED,
)
ANSWERS = _counter("answers_total", "prompts whose generation has ended", "finish_reason")
VERSION_SECONDS = _histogram("version_build_seconds", "building the weights of a version", buckets=_LONG)


def phase(word: str) -> str:
    """A phase of an edit as a label: one of `PHASES` or "other", so that the series stay few."""
    return word if word in PHASES else "other"


def exposition(*collectors: Collector) -> bytes:
    """All that is counted here, and what these collectors find out now, in the text format of Prometheus."""
    return b"".join(generate_latest(part) for part in (REGISTRY, *collectors))

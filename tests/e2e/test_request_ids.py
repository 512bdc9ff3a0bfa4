"""A request id is in the logs of the API and of the worker, and the work of a request is in the metrics."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from api.app import create_app
from cli.logs import stderr_handler
from service.application.development import Development
from service.bootstrap import build_container
from service.kit.metrics import REGISTRY
from service.settings import Settings
from tests.support.tiny_models import tiny
from workers.health_server import HealthServer
from workers.worker import Worker

torch.set_num_threads(1)

PROMPT = "The Eiffel Tower is located in the city of"
EDIT = {
    "subject": "Eiffel Tower",
    "prompt": "The {} is located in the city of",
    "target_new": " Rome",
    "guard": {"enabled": False},
    "hparams": {"layers": [1], "steps": 3, "contexts": 2},
}
WAIT = {"Prefer": "wait=60"}

Log = Callable[[], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Run a worker with a tiny model; `app` is its API."""
    model_folder, model = tmp_path_factory.mktemp("model"), tiny("gpt2")
    model.model.save_pretrained(model_folder)
    model.tokenizer.save_pretrained(model_folder)
    (model_folder / "corpus.txt").write_text(
        "\n".join(f"{PROMPT} Paris, and {i} is a number." for i in range(60))
    )
    data = tmp_path_factory.mktemp("data")
    settings = Settings(
        model=str(model_folder),
        data_dir=data,
        corpus=model_folder / "corpus.txt",
        covariance_tokens=1000,
        threads=1,
    )
    container = build_container(settings)
    new_worker = Worker(settings, container)
    thread = new_worker.start_in_thread()
    while not new_worker.ready.wait(0.05):
        new_worker.check()
        assert thread.is_alive()
    app = create_app(container.services, container.broker, settings, Development.ON)
    new_worker.app = app  # type: ignore[attr-defined]
    yield new_worker
    new_worker.stop()
    container.close()


@pytest.fixture
def client(worker: Worker) -> Iterator[TestClient]:
    app = worker.app  # type: ignore[attr-defined]
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000)) as client:
        yield client


@pytest.fixture
def log() -> Iterator[Log]:
    """Return the records logged since, as JSON lines of level info."""
    handler, root = stderr_handler("json"), logging.getLogger()
    buffer = io.StringIO()
    handler.setStream(buffer)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in buffer.getvalue().splitlines()]
    root.setLevel(level)
    root.removeHandler(handler)


def events_of_request(log: Log, request_id: str) -> set[tuple[str, str]]:
    """Return (logger, event) of the lines with a request id."""
    return {(line["logger"], line["event"]) for line in log() if line.get("request") == request_id}


def metric_samples(text: str) -> dict[str, float]:
    """Return every metric sample by name and label values."""
    families = text_string_to_metric_families(text)
    return {" ".join((s.name, *s.labels.values())): s.value for family in families for s in family.samples}


def test_request_id_in_generation_logs(client: TestClient, log: Log) -> None:
    """The request id of a generation is in the log lines of the API and of the worker."""
    request = {"prompt": PROMPT, "max_new_tokens": 3}
    answer = client.post("/generate", json=request, headers={"X-Request-Id": "speak-1"})
    assert answer.status_code == 200, answer.text
    events = events_of_request(log, "speak-1")
    assert {("api.request_log", "request"), ("service.engine.call_runner", "generation ended")} <= events


def test_request_id_in_edit_logs(client: TestClient, log: Log) -> None:
    """The request id of a job is in the log lines of the API and of the worker."""
    answer = client.post("/edits", json=EDIT, headers={"X-Request-Id": "edit-1", **WAIT})
    assert answer.json()["status"] == "applied", answer.text
    client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 1})  # the engine has finished the step
    events = events_of_request(log, "edit-1")
    worker = "service.engine.job_runner"
    assert {("api.request_log", "request"), (worker, "job started"), (worker, "job ended")} <= events


def test_generation_and_edit_metrics(client: TestClient) -> None:
    """A generation and an edit change every metric about them."""
    before = metric_samples(client.get("/metrics").text)
    request = {"prompts": [PROMPT, "Big Ben"], "max_new_tokens": 4, "seed": 1}
    generation = client.post("/generate", json=request).json()
    edit = client.post("/edits", json=EDIT, headers=WAIT).json()
    client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 1})
    after = metric_samples(client.get("/metrics").text)
    assert edit["status"] == "applied", edit

    def more(name: str) -> float:
        return after[f"palimpsest_{name}"] - before.get(f"palimpsest_{name}", 0)

    assert more("tokens_total") >= generation["usage"]["completion_tokens"] + 1
    reasons = [choice["finish_reason"] for choice in generation["choices"]]
    assert more(f"generations_finished_total {reasons[0]}") >= 1
    for name in ("admission", "arrival"):
        assert more(f"time_to_first_token_seconds_count {name}") == 2
    assert more("engine_step_seconds_count prefill") == 2
    assert more("engine_step_seconds_count decode") == more("batch_size_count") >= 3
    assert more("engine_step_seconds_count job") >= 5
    assert more("engine_steps_total") > 4
    assert more("version_build_seconds_count") >= 1
    assert more("jobs_ended_total edit applied") == more("job_seconds_count edit") == 1
    for phase in ("optimize", "solve", "measure", "perplexity", "commit"):
        assert more(f"edit_phase_seconds_count {phase}") == 1
    assert more("head_version") == 1


def test_cancelling_what_waits_counts_as_an_end(client: TestClient) -> None:
    """The API counts jobs that end without a worker."""
    long = {**EDIT["hparams"], "steps": 200, "stop_loss": 0}  # type: ignore[dict-item]
    first = client.post("/edits", json={**EDIT, "hparams": long}).json()
    second = client.post("/edits", json=EDIT).json()
    before = REGISTRY.get_sample_value("palimpsest_jobs_ended_total", CANCELLED_EDIT) or 0
    for job in (first, second):
        client.delete(f"/edits/{job['id']}")
    for job in (first, second):
        assert client.get(f"/edits/{job['id']}", headers=WAIT).json()["status"] == "cancelled"
    assert REGISTRY.get_sample_value("palimpsest_jobs_ended_total", CANCELLED_EDIT) == before + 2


CANCELLED_EDIT = {"kind": "edit", "status": "cancelled"}


def test_a_worker_that_serves_is_healthy(worker: Worker) -> None:
    """The health endpoint of a worker reports the health of its engine loop."""
    health_server = HealthServer("127.0.0.1", 0, worker.health_problem)
    health_server.start()
    try:
        assert httpx.get(f"http://127.0.0.1:{health_server.port}/healthz").status_code == 200
        worker.ready.clear()
        assert httpx.get(f"http://127.0.0.1:{health_server.port}/healthz").status_code == 503
    finally:
        worker.ready.set()
        health_server.stop()

"""One request, from the door to the worker: its id is in the lines of both, and its work in the metrics."""

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
from cli.logs import lines
from service.bootstrap import wire
from service.kit.metrics import REGISTRY
from service.settings import Settings
from tests.support.tiny_models import tiny
from workers.health_server import Exposition
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
    """A worker that serves a tiny model; its `app` is the door to it."""
    place, model = tmp_path_factory.mktemp("model"), tiny("gpt2")
    model.model.save_pretrained(place)
    model.tokenizer.save_pretrained(place)
    (place / "corpus.txt").write_text("\n".join(f"{PROMPT} Paris, and {i} is a number." for i in range(60)))
    data = tmp_path_factory.mktemp("data")
    asked = Settings(model=str(place), data=data, corpus=place / "corpus.txt", stat_tokens=1000, threads=1)
    wired = wire(asked)
    made = Worker(asked, wired)
    thread = made.start_in_thread()
    while not made.ready.wait(0.05):
        made.check()
        assert thread.is_alive()
    made.app = create_app(wired.operations, wired.broker, asked)  # type: ignore[attr-defined]
    yield made
    made.stop()
    wired.close()


@pytest.fixture
def client(worker: Worker) -> Iterator[TestClient]:
    with TestClient(worker.app, base_url="http://127.0.0.1") as client:  # type: ignore[attr-defined]
        yield client


@pytest.fixture
def log() -> Iterator[Log]:
    """What was logged since, as the lines of `--log-format json --log-level info`."""
    handler, root = lines("json"), logging.getLogger()
    said = io.StringIO()
    handler.setStream(said)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in said.getvalue().splitlines()]
    root.setLevel(level)
    root.removeHandler(handler)


def about(log: Log, request: str) -> set[tuple[str, str]]:
    """(logger, event) of the lines that bear an id."""
    return {(line["logger"], line["event"]) for line in log() if line.get("request") == request}


def samples(text: str) -> dict[str, float]:
    """Every sample, by its name and the values of its labels."""
    found = text_string_to_metric_families(text)
    return {" ".join((s.name, *s.labels.values())): s.value for family in found for s in family.samples}


def test_a_generation_can_be_followed(client: TestClient, log: Log) -> None:
    """The id of a request stands in the API's line about it and in the worker's line about its generation."""
    asked = {"prompt": PROMPT, "max_new_tokens": 3}
    answer = client.post("/generate", json=asked, headers={"X-Request-Id": "speak-1"})
    assert answer.status_code == 200, answer.text
    found = about(log, "speak-1")
    assert {("api.request_log", "request"), ("service.engine.engine", "generation ended")} <= found


def test_an_edit_can_be_followed(client: TestClient, log: Log) -> None:
    """The id of a request stands in the API's line about it and in the worker's lines about its job."""
    answer = client.post("/edits", json=EDIT, headers={"X-Request-Id": "edit-1", **WAIT})
    assert answer.json()["status"] == "applied", answer.text
    client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 1})  # the loop has come round
    found = about(log, "edit-1")
    worker = "service.engine.engine"
    assert {("api.request_log", "request"), (worker, "job started"), (worker, "job ended")} <= found


def test_what_is_done_is_counted(client: TestClient) -> None:
    """A generation and an edit show in every metric that is about them."""
    before = samples(client.get("/metrics").text)
    asked = {"prompts": [PROMPT, "Big Ben"], "max_new_tokens": 4, "seed": 1}
    spoken = client.post("/generate", json=asked).json()
    edited = client.post("/edits", json=EDIT, headers=WAIT).json()
    client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 1})
    after = samples(client.get("/metrics").text)
    assert edited["status"] == "applied", edited

    def more(name: str) -> float:
        return after[f"palimpsest_{name}"] - before.get(f"palimpsest_{name}", 0)

    assert more("tokens_total") >= spoken["usage"]["completion_tokens"] + 1
    reasons = [choice["finish_reason"] for choice in spoken["choices"]]
    assert more(f"answers_total {reasons[0]}") >= 1
    for name in ("admission", "arrival"):
        assert more(f"first_token_seconds_count {name}") == 2
    assert more("decode_step_seconds_count prompt") == 2
    assert more("decode_step_seconds_count token") == more("batch_rows_count") >= 3
    assert more("loop_turns_total") > 4
    assert more("version_build_seconds_count") >= 1
    assert more("jobs_ended_total edit applied") == more("job_seconds_count edit") == 1
    for phase in ("optimise", "solve", "measure", "perplexity", "land"):
        assert more(f"edit_phase_seconds_count {phase}") == 1
    assert more("head_version") == 1


def test_cancelling_what_waits_counts_as_an_end(client: TestClient) -> None:
    """Jobs that end without a worker are counted by the API."""
    first = client.post("/edits", json={**EDIT, "hparams": {**EDIT["hparams"], "steps": 200}}).json()  # type: ignore[dict-item]
    second = client.post("/edits", json=EDIT).json()
    before = REGISTRY.get_sample_value("palimpsest_jobs_ended_total", cancelled) or 0
    for job in (second, first):
        client.delete(f"/edits/{job['id']}")
        assert client.get(f"/edits/{job['id']}", headers=WAIT).json()["status"] == "cancelled"
    assert REGISTRY.get_sample_value("palimpsest_jobs_ended_total", cancelled) == before + 2


cancelled = {"kind": "edit", "status": "cancelled"}


def test_a_worker_that_serves_is_healthy(worker: Worker) -> None:
    """The health of a worker's own endpoint is that of its loop."""
    door = Exposition("127.0.0.1", 0, worker.trouble)
    door.start()
    try:
        assert httpx.get(f"http://127.0.0.1:{door.port}/healthz").status_code == 200
        worker.ready.clear()
        assert httpx.get(f"http://127.0.0.1:{door.port}/healthz").status_code == 503
    finally:
        worker.ready.set()
        door.stop()

"""A worker's own endpoint: metrics and health."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.errors import Misconfigured
from workers.health_server import Exposition


class Worker:
    """What is asked for its health."""

    trouble: str | None = None

    def __call__(self) -> str | None:
        return self.trouble


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def http(worker: Worker) -> Iterator[httpx.Client]:
    served = Exposition("127.0.0.1", 0, worker)
    served.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}") as client:
        yield client
    served.stop()


def test_metrics_can_be_scraped(http: httpx.Client) -> None:
    """/metrics is text that Prometheus can read, with the metrics of the house in it."""
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    assert {"palimpsest_loop_turns", "palimpsest_batch_rows", "process_resident_memory_bytes"} <= names


def test_health_is_that_of_the_loop(http: httpx.Client, worker: Worker) -> None:
    """/healthz is 200 while the worker serves, and 503 with the reason while it does not."""
    assert (http.get("/healthz").status_code, http.get("/healthz").text) == (200, "alive\n")
    worker.trouble = "the loop is down"
    assert (http.get("/healthz").status_code, http.get("/healthz").text) == (503, "the loop is down\n")
    worker.trouble = None
    assert http.get("/healthz").status_code == 200


def test_nothing_else_is_there(http: httpx.Client) -> None:
    """Any other path is 404, and nothing can be sent."""
    assert http.get("/").status_code == 404
    assert http.post("/metrics").status_code == 501


def test_a_silent_client_holds_nobody_up(worker: Worker) -> None:
    """One who connects and says nothing neither keeps others from an answer nor the worker from its end."""
    served = Exposition("127.0.0.1", 0, worker)
    served.start()
    with socket.create_connection(("127.0.0.1", served.port)):
        assert httpx.get(f"http://127.0.0.1:{served.port}/healthz").status_code == 200
        served.stop()


def test_a_taken_port_is_told(worker: Worker) -> None:
    """A port that is in use is a wrong configuration, with what to change."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Misconfigured, match=f"127.0.0.1:{port} .*--metrics-port"):
            Exposition("127.0.0.1", port, worker)


def test_stopping_without_a_start_closes_the_port(worker: Worker) -> None:
    """An endpoint that was never started can be stopped, and its port is free again."""
    served = Exposition("127.0.0.1", 0, worker)
    served.stop()
    again = Exposition("127.0.0.1", served.port, worker)
    again.stop()

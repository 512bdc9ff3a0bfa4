"""A process is killed at every named crash point; the others continue, and every guarantee to the client holds."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest

from service.kit.crash_points import CRASH_POINTS
from service.kit.ids import new_id
from tests.support.processes import CliProcess, Deployment, Resource, ServiceClient, wait_until

PROMPT = "The {} is located in the city of"
GENERATE_REQUEST: Resource = {
    "prompt": PROMPT.replace("{}", "Eiffel Tower"),
    "max_new_tokens": 5,
    "version": "base",
}
#: a fast edit, whatever its quality
MINIMAL_EDIT_OPTIONS: Resource = {"hparams": {"contexts": 2, "steps": 1}, "guard": {"enabled": False}}

#: crash points of a worker during an edit -> attempts of the edit
EDIT_POINTS = {
    "take.after": 1,
    "start.before_commit": 1,
    "start.after_commit": 2,
    "edit.after_compute": 2,
    "apply.before_commit": 2,
    "apply.after_commit": 1,
    "end.after_publish": 1,
    "done.after": 1,
}
#: crash points of a worker during a generation -> `reset` events of its stream
GENERATION_POINTS = {
    "take.after": 0,
    "generate.after_admit": 0,
    "generate.after_token": 1,
    "generate.before_end": 1,
    "generate.after_end": 0,
}
#: crash points of the API by request
SUBMIT_POINTS = ["job.before_commit", "job.after_commit", "job.after_announce"]
CALL_POINTS = ["call.after"]
REVERT_POINTS = ["revert.before_commit", "revert.after_commit"]


@pytest.fixture(scope="module")
def shared_deployment(start_deployment: Callable[..., Deployment]) -> Deployment:
    """An API and a worker that are not killed."""
    return start_deployment(workers=1)


@pytest.fixture
def deployment(shared_deployment: Deployment) -> Iterator[Deployment]:
    """Return the deployment. After each test the ledger verifies, Redis is empty, and no edit is active."""
    yield shared_deployment
    wait_until(lambda: not shared_deployment.queue_leftovers(), "Redis to be empty")
    shared_deployment.verify_ledger()
    for edit in shared_deployment.get("/edits", status="applied")["items"]:
        shared_deployment.revert(edit)


@pytest.fixture
def edit_post() -> Resource:
    """Return a POST of a new edit with an idempotency key."""
    subject = f"Tower of {new_id('somebody')[-8:]}"
    body = {"subject": subject, "prompt": PROMPT, "target_new": "Rome", **MINIMAL_EDIT_OPTIONS}
    return {"json": body, "headers": {"Idempotency-Key": new_id("key")}}


def assert_killed(process: CliProcess) -> None:
    """Assert that the process was killed at the crash point."""
    assert process.wait() == -signal.SIGKILL, process.log()


def assert_applied_once(deployment: ServiceClient, edit_post: Resource, edit: Resource) -> Resource:
    """Assert that the request created one edit with one ledger entry."""
    ended = deployment.wait_for_edit(edit)
    assert ended["status"] == "applied", ended
    assert [e["id"] for e in deployment.list_all("/edits", subject=edit_post["json"]["subject"])] == [
        edit["id"]
    ]
    entries = [entry for entry in deployment.list_all("/ledger") if entry["edit_id"] == edit["id"]]
    assert [(entry["kind"], entry["version"]) for entry in entries] == [("apply", ended["version"])]
    return ended


def test_every_point_is_tried() -> None:
    """Every crash point is tested."""
    assert {
        *EDIT_POINTS,
        *GENERATION_POINTS,
        *SUBMIT_POINTS,
        *CALL_POINTS,
        *REVERT_POINTS,
    } == CRASH_POINTS.keys()


@pytest.mark.parametrize("point", EDIT_POINTS)
def test_worker_crash_during_edit(deployment: Deployment, edit_post: Resource, point: str) -> None:
    """Another worker runs the edit unless it was committed; it is committed once."""
    doomed = deployment.start_serving_worker(crash_at=point)
    with deployment.only_worker(doomed):
        edit = deployment.http.post("/edits", **edit_post).json()
        assert_killed(doomed)
    assert assert_applied_once(deployment, edit_post, edit)["attempts"] == EDIT_POINTS[point]


@pytest.mark.parametrize("point", GENERATION_POINTS)
def test_worker_crash_during_generation(deployment: Deployment, point: str) -> None:
    """The client receives the whole text, from another worker unless it had been published."""
    expected = deployment.generate(**GENERATE_REQUEST)["text"]
    doomed = deployment.start_serving_worker(crash_at=point)
    with ExitStack() as stack:
        with deployment.only_worker(doomed):
            events = stack.enter_context(
                deployment.stream_events("POST", "/generate", json=GENERATE_REQUEST | {"stream": True})
            )
            assert_killed(doomed)
        received = list(events)
    names = [name for name, _ in received]
    assert names.count("reset") == GENERATION_POINTS[point]
    reset_index = names.index("reset") + 1 if "reset" in names else 0
    *tokens, (last, end) = received[reset_index:]
    assert last == "end"
    assert "".join(data["text"] for _, data in tokens) == end["choices"][0]["text"] == expected


@pytest.mark.parametrize("point", SUBMIT_POINTS)
def test_api_crash_during_edit_submission(deployment: Deployment, edit_post: Resource, point: str) -> None:
    """A retry with the same idempotency key gives one edit, which is committed once."""
    with deployment.another_api(crash_at=point) as (doomed, http):
        with pytest.raises(httpx.TransportError):
            http.post("/edits", **edit_post)
        assert_killed(doomed)
    edit = deployment.http.post("/edits", **edit_post).json()
    assert_applied_once(deployment, edit_post, edit)


@pytest.mark.parametrize("point", CALL_POINTS)
def test_api_crash_during_generation(deployment: Deployment, point: str) -> None:
    """A retried request is answered."""
    expected = deployment.generate(**GENERATE_REQUEST)["text"]
    with deployment.another_api(crash_at=point) as (doomed, http):
        with pytest.raises(httpx.TransportError):
            http.post("/generate", json=GENERATE_REQUEST)
        assert_killed(doomed)
    assert deployment.generate(**GENERATE_REQUEST)["text"] == expected


@pytest.mark.parametrize("point", REVERT_POINTS)
def test_api_crash_during_revert(deployment: Deployment, edit_post: Resource, point: str) -> None:
    """A retried revert reverts the edit once."""
    edit = deployment.http.post("/edits", **edit_post).json()
    assert_applied_once(deployment, edit_post, edit)
    with deployment.another_api(crash_at=point) as (doomed, http):
        with pytest.raises(httpx.TransportError):
            http.delete(f"/edits/{edit['id']}")
        assert_killed(doomed)
    reverted = deployment.revert(edit)
    assert reverted["status"] == "reverted"
    entries = [entry for entry in deployment.list_all("/ledger") if entry["edit_id"] == edit["id"]]
    assert [entry["kind"] for entry in entries] == ["apply", "revert"]
    assert entries[-1]["version"] == reverted["reverted_version"]

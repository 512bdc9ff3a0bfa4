"""At every named point a process dies on the spot; the others go on, and the client gets what it was promised."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest

from service.kit.crash_points import POINTS
from service.kit.ids import new_id
from tests.support.processes import Client, Deployment, Process, Resource, until

pytestmark = pytest.mark.servers

PROMPT = "The {} is located in the city of"
ASKED = {"prompt": PROMPT.replace("{}", "Eiffel Tower"), "max_new_tokens": 5, "version": "base"}
#: an edit of which only the way counts
BARE: Resource = {"hparams": {"contexts": 2, "steps": 1}, "guard": {"enabled": False}}

#: points of a worker on the way of an edit, and the attempts that the edit takes when one ends there
EDITING = {
    "take.after": 1,
    "start.before_commit": 1,
    "start.after_commit": 2,
    "edit.after_compute": 2,
    "apply.before_commit": 2,
    "apply.after_commit": 1,
    "end.after_publish": 1,
    "done.after": 1,
}
#: those on the way of a generation, and how often its listener is told to begin anew
SPEAKING = {
    "take.after": 0,
    "generate.after_admit": 0,
    "generate.after_token": 1,
    "generate.before_end": 1,
    "generate.after_end": 0,
}
#: points of the API, by what is asked of it
ACCEPTING = ["job.before_commit", "job.after_commit", "job.after_announce"]
CALLING = ["call.after"]
REVERTING = ["revert.before_commit", "revert.after_commit"]


@pytest.fixture(scope="module")
def deployed(deploy: Callable[..., Deployment]) -> Deployment:
    """An API and a worker that outlive all that die here."""
    return deploy(workers=1)


@pytest.fixture
def deployment(deployed: Deployment) -> Iterator[Deployment]:
    """The survivors. After every death the ledger verifies, nothing is left over in Redis, and nothing is applied."""
    yield deployed
    until(lambda: not deployed.left_over(), "Redis to be empty")
    deployed.verified()
    for edit in deployed.get("/edits", status="applied")["items"]:
        deployed.revert(edit)


@pytest.fixture
def asked() -> Resource:
    """A POST of an edit that nobody else has asked for, as a client sends it that may have to send it again."""
    subject = f"Tower of {new_id('somebody')[-8:]}"
    body = {"subject": subject, "prompt": PROMPT, "target_new": "Rome", **BARE}
    return {"json": body, "headers": {"Idempotency-Key": new_id("key")}}


def died(process: Process) -> None:
    """It was killed: the point was reached."""
    assert process.ended() == -signal.SIGKILL, process.log()


def landed_once(deployment: Client, asked: Resource, edit: Resource) -> Resource:
    """The request made this one edit, and the edit one entry."""
    ended = deployment.ended(edit)
    assert ended["status"] == "applied", ended
    assert [e["id"] for e in deployment.pages("/edits", subject=asked["json"]["subject"])] == [edit["id"]]
    entries = [entry for entry in deployment.pages("/ledger") if entry["edit_id"] == edit["id"]]
    assert [(entry["kind"], entry["version"]) for entry in entries] == [("apply", ended["version"])]
    return ended


def test_every_point_is_tried() -> None:
    """No named point is passed over."""
    assert {*EDITING, *SPEAKING, *ACCEPTING, *CALLING, *REVERTING} == POINTS.keys()


@pytest.mark.parametrize("point", EDITING)
def test_a_worker_dies_over_an_edit(deployment: Deployment, asked: Resource, point: str) -> None:
    """The edit is done by another worker unless it was done, and lands once."""
    doomed = deployment.hire(crash_at=point)
    with deployment.alone(doomed):
        edit = deployment.http.post("/edits", **asked).json()
        died(doomed)
    assert landed_once(deployment, asked, edit)["attempts"] == EDITING[point]


@pytest.mark.parametrize("point", SPEAKING)
def test_a_worker_dies_over_a_generation(deployment: Deployment, point: str) -> None:
    """The client hears the whole text, from another worker unless it was said."""
    expected = deployment.generate(**ASKED)["text"]
    doomed = deployment.hire(crash_at=point)
    with ExitStack() as stack:
        with deployment.alone(doomed):
            events = stack.enter_context(
                deployment.events("POST", "/generate", json=ASKED | {"stream": True})
            )
            died(doomed)
        told = list(events)
    names = [name for name, _ in told]
    assert names.count("restart") == SPEAKING[point]
    since = names.index("restart") + 1 if "restart" in names else 0
    *tokens, (last, end) = told[since:]
    assert last == "end"
    assert "".join(data["text"] for _, data in tokens) == end["choices"][0]["text"] == expected


@pytest.mark.parametrize("point", ACCEPTING)
def test_the_api_dies_over_an_edit(deployment: Deployment, asked: Resource, point: str) -> None:
    """Whoever sends the request again, with its key, has one edit, which lands once."""
    with deployment.another_api(crash_at=point) as (doomed, http):
        with pytest.raises(httpx.TransportError):
            http.post("/edits", **asked)
        died(doomed)
    edit = deployment.http.post("/edits", **asked).json()
    landed_once(deployment, asked, edit)


@pytest.mark.parametrize("point", CALLING)
def test_the_api_dies_over_a_generation(deployment: Deployment, point: str) -> None:
    """Whoever asks again is answered."""
    expected = deployment.generate(**ASKED)["text"]
    with deployment.another_api(crash_at=point) as (doomed, http):
        with pytest.raises(httpx.TransportError):
            http.post("/generate", json=ASKED)
        died(doomed)
    assert deployment.generate(**ASKED)["text"] == expected


@pytest.mark.parametrize("point", REVERTING)
def test_the_api_dies_over_a_revert(deployment: Deployment, asked: Resource, point: str) -> None:
    """Whoever says it again has the edit reverted, once."""
    edit = deployment.http.post("/edits", **asked).json()
    landed_once(deployment, asked, edit)
    with deployment.another_api(crash_at=point) as (doomed, http):
        with pytest.raises(httpx.TransportError):
            http.delete(f"/edits/{edit['id']}")
        died(doomed)
    reverted = deployment.revert(edit)
    assert reverted["status"] == "reverted"
    entries = [entry for entry in deployment.pages("/ledger") if entry["edit_id"] == edit["id"]]
    assert [entry["kind"] for entry in entries] == ["apply", "revert"]
    assert entries[-1]["version"] == reverted["reverted_version"]

"""POST, GET and DELETE of edits."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.application import conversations
from tests.support.application import TOWER, FakeWorker, TestApp
from tests.support.chat_templates import START, STOP


def test_an_edit_is_accepted_with_its_place(client: TestClient) -> None:
    """POST returns 202 with the Location and the queued resource."""
    answer = client.post("/edits", json=TOWER)
    assert answer.status_code == 202
    edit = answer.json()
    assert answer.headers["location"] == f"/edits/{edit['id']}" == edit["links"]["self"]
    assert edit["status"] == "queued"
    assert client.get(answer.headers["location"]).json() == edit


def test_many_edits_are_queued_together(client: TestClient) -> None:
    """A list of edits returns their resources in order in `items`, also for a list of one."""
    big = {"subject": "Big Ben", "prompt": "{} stands in", "target_new": "Lisbon"}
    answer = client.post("/edits", json={"edits": [TOWER, big]})
    assert answer.status_code == 202
    assert answer.headers["location"] == "/edits"
    assert [e["subject"] for e in answer.json()["items"]] == ["Eiffel Tower", "Big Ben"]
    assert list(client.post("/edits", json={"edits": [big]}).json()) == ["items"]


def test_one_bad_edit_keeps_all_out(client: TestClient) -> None:
    """An invalid edit in a list rejects the whole list. The error names the edit and its field."""
    answer = client.post("/edits", json={"edits": [TOWER, TOWER | {"prompt": "no slot"}]})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "edits.1.prompt"
    assert "exactly one {}" in answer.json()["detail"]
    assert client.get("/edits").json() == {"items": [], "next": None}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": "The tower is in"}, "prompt"),
        ({"prompt": "{} and {} are in"}, "prompt"),
        ({"subject": ""}, "subject"),
        ({"subject": "  \t"}, "subject"),
        ({"target_new": ""}, "target_new"),
        ({"target_new": "\x00"}, "target_new"),
        ({"prompt": "{} is in " + "a very long way to go " * 20}, "prompt"),
        ({"prompt": "x" * 30_000 + "{}"}, "prompt"),
        ({"method": "hope"}, "method"),
        ({"hparams": {"warp": 9}}, "hparams"),
        ({"hparams": {"layers": [99]}}, "hparams"),
        ({"hparams": {"layers": [10**400]}}, "hparams"),
        ({"hparams": [1]}, "hparams"),
        ({"hparams": {"\u0000": {"a": [[[]]]}}}, "hparams"),
        ({"dry_run": "perhaps"}, "dry_run"),
        ({"colour": "red"}, "colour"),
        ({"subject": None}, "subject"),
        ({"subject": 3}, "subject"),
        ({"guard": {"min_probability": 2}}, "guard.min_probability"),
        ({"probes": {"paraphrase": [""]}}, "probes.paraphrase.0"),
        ({"probes": {"neighborhood": [{"prompt": "x"}]}}, "probes.neighborhood.0.target"),
    ],
)
def test_bad_input_is_refused_in_plain_words(client: TestClient, change: dict[str, Any], field: str) -> None:
    """Invalid input gets 422 with the field and a message without pydantic's wording, and no edit is
    created."""
    answer = client.post("/edits", json=TOWER | change)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert [error["field"] for error in body["errors"]] == [field]
    words = body["detail"]
    assert words
    assert not any(
        jargon in words for jargon in ("Input should", "Value error", "pydantic", "Traceback", "`text`")
    )
    assert client.get("/edits").json()["items"] == []


def test_missing_fields_are_named(client: TestClient) -> None:
    """The error lists every missing field; a missing prompt is named when the others are given."""
    fields = [e["field"] for e in client.post("/edits", json={}).json()["errors"]]
    assert fields == ["subject", "target_new"]
    answer = client.post("/edits", json={"subject": "Rome", "target_new": "Paris"})
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "prompt"
    assert answer.json()["detail"] == "give either `prompt` or `messages`."


@pytest.mark.parametrize("body", ["[]", "null", "3", '"text"', "true"])
def test_a_body_that_is_no_object_is_refused(client: TestClient, body: str) -> None:
    """A JSON body that is not an object gets 422."""
    answer = client.post("/edits", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "body"


def test_a_template_in_user_text_stays_text(client: TestClient) -> None:
    """User text is never passed to str.format: braces and percent signs are preserved."""
    odd = TOWER | {"subject": "{0.__class__} %s {x!r}", "prompt": "The {} is %d in {curly} city"}
    edit = client.post("/edits", json=odd).json()
    assert edit["subject"] == odd["subject"]
    assert edit["prompt"] == odd["prompt"]


def test_unknown_ids_are_not_found(client: TestClient) -> None:
    """An unknown or malformed id is 404 on every path below it."""
    for odd in ("edit_01JABCDEFGHJKMNPQRSTVWXYZ0", "x", "%00", "%F0%28", "a" * 3000, "..%2f..", "edit%20"):
        for path in (f"/edits/{odd}", f"/edits/{odd}/delta", f"/edits/{odd}/events"):
            answer = client.get(path)
            assert answer.status_code == 404, path
            assert answer.headers["content-type"] == "application/problem+json"
    assert client.delete("/edits/edit_0").status_code == 404


def test_a_trace_is_no_edit(client: TestClient) -> None:
    """The id of a trace gets 404 as an edit."""
    trace = client.post("/trace", json={"prompt": "Big Ben is in", "subject": "Big Ben"}).json()
    assert client.get(f"/edits/{trace['id']}").status_code == 404


def test_waiting_holds_the_answer(client: TestClient, worker: FakeWorker) -> None:
    """With Prefer: wait the response is sent when the edit has ended, with 200 and its result."""
    answer = client.post("/edits", json=TOWER, headers={"prefer": "respond-async, wait=20"})
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=20"
    assert answer.json()["status"] == "applied"
    assert answer.json()["version"] == 1
    assert answer.json()["result"] == {"es": 1.0}


def test_waiting_ends_when_the_time_is_up(client: TestClient) -> None:
    """If the edit has not ended within the requested time, the response is 202."""
    answer = client.post("/edits", json=TOWER, headers={"prefer": "wait=1"})
    assert answer.status_code == 202
    assert answer.json()["status"] == "queued"


@pytest.mark.parametrize(
    "prefer", ["wait=", "wait=-1", "wait=abc", "handling=lenient", "await=20", "", ";;,", "wait=1e9"]
)
def test_a_preference_that_says_nothing_is_ignored(client: TestClient, prefer: str) -> None:
    """Unknown and malformed preferences are ignored (RFC 7240)."""
    answer = client.post("/edits", json=TOWER, headers={"prefer": prefer})
    assert answer.status_code == 202
    assert "preference-applied" not in answer.headers


def test_the_wait_is_capped(client: TestClient, worker: FakeWorker) -> None:
    """The wait is limited to 60 seconds."""
    answer = client.post("/edits", json=TOWER, headers={"prefer": 'wait="999999"'})
    assert answer.headers["preference-applied"] == "wait=60"


def test_get_waits_too(client: TestClient, worker: FakeWorker) -> None:
    """A GET with Prefer: wait returns when the edit has ended."""
    worker.may_finish.clear()
    edit = client.post("/edits", json=TOWER).json()
    threading.Timer(0.2, worker.may_finish.set).start()
    answer = client.get(edit["links"]["self"], headers={"prefer": "wait=20"})
    assert answer.status_code == 200
    assert answer.json()["status"] == "applied"


def test_the_same_idempotency_key_creates_one_edit(client: TestClient) -> None:
    """A repeated request with the same Idempotency-Key returns the same edit, also with its fields in another
    order."""
    key = {"idempotency-key": "k-1"}
    first = client.post("/edits", json=TOWER, headers=key)
    again = client.post("/edits", json=dict(reversed(TOWER.items())), headers=key)
    assert again.status_code == 202
    assert again.json() == first.json()
    assert len(client.get("/edits").json()["items"]) == 1


def test_a_key_belongs_to_one_body(client: TestClient) -> None:
    """An Idempotency-Key with another body, or on another path, gets 422."""
    key = {"idempotency-key": "k-1"}
    client.post("/edits", json=TOWER, headers=key)
    other = client.post("/edits", json=TOWER | {"target_new": "Oslo"}, headers=key)
    assert other.status_code == 422
    trace = client.post("/trace", json={"prompt": "Big Ben is in", "subject": "Big Ben"}, headers=key)
    assert trace.status_code == 422


@pytest.mark.parametrize("key", ["", " ", "a" * 256, "a b", b"\xff\xfe"])
def test_an_invalid_idempotency_key_is_refused(client: TestClient, key: str | bytes) -> None:
    """An Idempotency-Key that is empty, too long, contains spaces or is not ASCII gets 422."""
    answer = client.post(
        "/edits", json=TOWER, headers=[(b"idempotency-key", key if isinstance(key, bytes) else key.encode())]
    )
    assert answer.status_code == 422


def test_delete_reverts_an_applied_edit(client: TestClient, worker: FakeWorker) -> None:
    """DELETE reverts an applied edit and is idempotent."""
    edit = client.post("/edits", json=TOWER, headers={"prefer": "wait=20"}).json()
    first = client.delete(edit["links"]["self"])
    assert first.status_code == 200
    assert first.json()["status"] == "reverted"
    assert first.json()["reverted_version"] == 2
    second = client.delete(edit["links"]["self"])
    assert second.status_code == 200
    assert second.json() == first.json()


def test_delete_cancels_a_waiting_edit(client: TestClient) -> None:
    """DELETE cancels a queued edit and is idempotent."""
    edit = client.post("/edits", json=TOWER).json()
    assert client.delete(edit["links"]["self"]).json()["status"] == "cancelled"
    assert client.delete(edit["links"]["self"]).json()["status"] == "cancelled"


def test_delete_cancels_a_running_edit(client: TestClient, worker: FakeWorker) -> None:
    """DELETE of a running edit requests its cancellation; with Prefer: wait it returns when the edit has
    ended."""
    worker.may_finish.clear()
    edit = client.post("/edits", json=TOWER).json()
    assert worker.progress_reported.wait(60)
    assert client.delete(edit["links"]["self"]).json()["status"] == "running"
    worker.may_finish.set()
    assert client.delete(edit["links"]["self"], headers={"prefer": "wait=20"}).json()["status"] == "cancelled"


def test_the_delta_is_a_file(client: TestClient, worker: FakeWorker) -> None:
    """The factors of an applied edit are downloaded as a file named after its id."""
    edit = client.post("/edits", json=TOWER, headers={"prefer": "wait=20"}).json()
    answer = client.get(edit["links"]["delta"])
    assert answer.content == b"factors of " + edit["id"].encode()
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == f'attachment; filename="{edit["id"]}.safetensors"'


def test_an_edit_that_was_never_applied_has_no_delta(client: TestClient) -> None:
    """The delta of a queued edit gets 409."""
    edit = client.post("/edits", json=TOWER).json()
    assert client.get(edit["links"]["delta"]).status_code == 409


def test_pages_hold_every_edit_once(client: TestClient) -> None:
    """Following `next` returns every edit once, newest first. Filters select edits by status and subject."""
    made = [client.post("/edits", json=TOWER | {"subject": f"Tower {i}"}).json()["id"] for i in range(5)]
    client.delete(f"/edits/{made[2]}")
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = client.get("/edits", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [edit["id"] for edit in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == made[::-1]
    assert [e["id"] for e in client.get("/edits?status=cancelled").json()["items"]] == [made[2]]
    assert [e["id"] for e in client.get("/edits?subject=Tower 3").json()["items"]] == [made[3]]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=201", "limit=x", "limit=99999999999999999999999", "status=happy", "cursor=%FF", "cursor=zzz",
        "cursor=", "cursor=%00", "subject=%00", "cursor=IlxkODAwIg", "cursor=MTAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAw",
        "cursor=IlxcdWQ4MDAi", "cursor=Ilx1ZDgwMCI",
    ],
)  # fmt: skip
def test_bad_queries_are_refused(client: TestClient, query: str) -> None:
    """An invalid limit or status gets 422, and an invalid cursor causes no server error."""
    answer = client.get(f"/edits?{query}")
    assert answer.status_code == 422 or (answer.status_code == 200 and query.startswith("cursor="))
    if query.startswith("cursor="):
        assert client.get(f"/ledger?{query}").status_code in (200, 422)


def test_a_full_queue_says_when_to_come_back(tmp_path: Any, wiring: dict[str, Any]) -> None:
    """When the queue is full, the response is 429 with Retry-After, and no edit is queued."""
    test_app = TestApp(tmp_path, max_queue=2, **wiring)
    client = TestClient(test_app.app, raise_server_exceptions=False)
    answer = client.post("/edits", json={"edits": [TOWER] * 3})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert client.get("/edits").json()["items"] == []
    test_app.close()


def test_rejected_edits_show_their_figures(client: TestClient, worker: FakeWorker) -> None:
    """An edit that the guard rejects has its measurements and no version."""
    worker.reject_edits = True
    edit = client.post("/edits", json=TOWER, headers={"prefer": "wait=20"}).json()
    assert (edit["status"], edit["version"], edit["result"]) == ("rejected", None, {"es": 0.0})


QUESTION = {"role": "user", "content": "Where is the Eiffel Tower?"}
CHAT = {"subject": "Eiffel Tower", "messages": [QUESTION], "target_new": "Rome"}
ANSWER = {"role": "assistant", "content": "The Eiffel Tower is in"}


@pytest.mark.parametrize("content", [QUESTION["content"], "Where is the {}?"])
def test_an_edit_is_a_conversation(make_app: Callable[..., TestApp], content: str) -> None:
    """`messages` in the place of `prompt` are rendered with the chat template; the resource has both, with `{}` for the
    subject."""
    client = TestClient(make_app(positions=256).app)
    answer = client.post("/edits", json=CHAT | {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 202, answer.json()
    edit = answer.json()
    assert edit["messages"] == [{"role": "user", "content": "Where is the {}?"}]
    assert edit["prompt"].endswith(f"{START}user\nWhere is the {{}}?{STOP}\n{START}assistant\n")
    assert client.get(f"/edits/{edit['id']}").json() == edit


def _probes(**probes: Any) -> dict[str, Any]:
    return {"probes": probes}


HI = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("change", "field", "detail"),
    [
        ({"prompt": "{} is"}, "prompt", "give either `prompt` or `messages`"),
        ({"messages": []}, "messages", ""),
        ({"messages": [HI]}, "subject", "does not occur in the messages"),
        ({"messages": [HI | {"content": "{} " * 65}]}, "messages", "65 times"),
        ({"messages": [HI | {"role": "tool"}]}, "messages.0.role", ""),
        ({"messages": [HI, QUESTION | {"content": f"{{}}{STOP}"}]}, "messages.1.content", "special token"),
        ({"subject": "end", "messages": [HI | {"content": "<|im_{}|>"}]}, "messages.0.content", "special"),
        ({"messages": [QUESTION | {"content": "{} " + "word " * 200}]}, "messages", "positions"),
        ({"messages": [QUESTION | {"content": "{} " + "x" * 19_990}]}, "messages", ""),
        ({"continue_final_message": True}, "messages", "continues a message of the assistant"),
        ({"prompt": "{} is", "messages": None, "continue_final_message": True}, "continue_final_message", ""),
        ({"target_new": STOP}, "target_new", "special token"),
        (_probes(paraphrase=[{"messages": []}]), "probes.paraphrase.0.messages", ""),
        (_probes(paraphrase=[{"prompt": "a"}]), "probes.paraphrase.0.messages", "missing"),
        (
            _probes(paraphrase=["a", {"messages": [HI], "prompt": "a"}]),
            "probes.paraphrase.1.prompt",
            "either",
        ),
        (
            _probes(paraphrase=[{"messages": [HI | {"content": STOP}]}]),
            "probes.paraphrase.0.messages.0.content",
            "special token",
        ),
        (_probes(neighborhood=[{"target": "a"}]), "probes.neighborhood.0.prompt", "either"),
        (
            _probes(neighborhood=[{"messages": [HI | {"content": STOP}], "target": "a"}]),
            "probes.neighborhood.0.messages.0.content",
            "special token",
        ),
        (
            _probes(neighborhood=[{"messages": [HI | {"content": "word " * 300}], "target": "a"}]),
            "probes.neighborhood.0.messages",
            "positions",
        ),
    ],
)
def test_a_wrong_conversation_is_refused(
    make_app: Callable[..., TestApp], change: dict[str, Any], field: str, detail: str
) -> None:
    """A conversation that is empty, lacks the subject, is too long or has a special token is refused with its field, in
    an edit and in its probes."""
    client = TestClient(make_app(positions=256).app)
    answer = client.post("/edits", json=CHAT | {"probes": {}} | change)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert detail in answer.json()["detail"]
    assert client.get("/edits").json()["items"] == []


def test_probes_may_be_conversations(make_app: Callable[..., TestApp]) -> None:
    """A probe is a string or a conversation; the stored request has the text of its template."""
    client = TestClient(make_app(positions=256).app)
    probes = {
        "paraphrase": ["The {} is in", {"messages": [{"role": "user", "content": "The {}?"}]}],
        "neighborhood": [{"messages": [HI, ANSWER], "continue_final_message": True, "target": "Paris"}],
    }
    stored = client.post("/edits", json=TOWER | {"probes": probes}).json()["probes"]
    assert stored["paraphrase"][0] == "The {} is in"
    assert "user\nThe Eiffel Tower?" in stored["paraphrase"][1]["prompt"]
    assert stored["neighborhood"][0]["prompt"].endswith("assistant\nThe Eiffel Tower is in")


def test_a_model_without_a_template_edits_prompts_only(make_app: Callable[..., TestApp]) -> None:
    """A conversation for a model without a chat template is refused with what to send in its place."""
    client = TestClient(make_app(chat_template=None).app)
    for path, body in (("/edits", CHAT), ("/trace", {"subject": "Eiffel Tower", "messages": [QUESTION]})):
        answer = client.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "no_chat_template")
        assert "send a `prompt` in their place" in answer.json()["detail"]
    assert client.post("/edits", json=TOWER).status_code == 202


def test_the_conversations_of_a_request_are_limited(
    make_app: Callable[..., TestApp], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request with more conversations than the limit is refused, and one whose conversations take too long."""
    client = TestClient(make_app(positions=256).app)
    body = {"edits": [CHAT] * 3}
    monkeypatch.setattr(conversations, "MAX_CONVERSATIONS", 2)
    answer = client.post("/edits", json=body)
    assert answer.status_code == 422 and "more than 2 conversations" in answer.json()["detail"]
    monkeypatch.setattr(conversations, "MAX_CONVERSATIONS", 3)
    assert client.post("/edits", json=body).status_code == 202
    monkeypatch.setattr(conversations, "RENDERING_SECONDS", -1.0)
    assert client.post("/edits", json=body).status_code == 503


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "needs a dry run"),
        ({"dry_run": True, "hparams": {"layers": [1]}}, "leave `layers` out"),
        ({"dry_run": True, "method": "ft"}, "the layers of ft are fixed: use one of rome"),
    ],
)
def test_layers_are_tried_in_a_dry_run_that_leaves_them_open(
    client: TestClient, more: dict[str, Any], said: str
) -> None:
    """`try_layers` is refused where it could not be obeyed, at its field and with what to change."""
    answer = client.post("/edits", json=TOWER | {"try_layers": True} | more)
    assert answer.status_code == 422
    assert said in answer.text and "try_layers" in answer.text


def test_a_list_is_downloaded(test_app: TestApp, client: TestClient) -> None:
    """The filtered list is a file, as CSV with neutralized formulas or as JSON with the items of the pages."""
    names = ["Nile", "=Rhine", "Seine"]
    client.post("/edits", json={"edits": [TOWER | {"subject": name} for name in names], "batch": "rivers"})
    client.post("/edits", json=TOWER)
    answer = client.get("/edits/export", params={"batch": "rivers"})
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["content-disposition"] == 'attachment; filename="edits.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    assert [row["subject"] for row in rows] == ["Seine", "'=Rhine", "Nile"]
    assert rows[0]["status"] == "queued" and rows[0]["dry_run"] == "false"
    page = client.get("/edits", params={"batch": "rivers"}).json()
    assert client.get("/edits/export", params={"batch": "rivers", "format": "json"}).json() == page
    assert client.get("/edits/export", params={"since": "never"}).status_code == 422
    assert len(list(csv.reader(io.StringIO(client.get("/edits/export?search=nothing").text)))) == 1


def test_edits_of_one_request_share_their_batch(client: TestClient) -> None:
    """The batch of a list is that of its edits, unless an edit names its own; a name with a space is refused."""
    edits = [TOWER, TOWER | {"subject": "Nile", "batch": "other"}]
    items = client.post("/edits", json={"edits": edits, "batch": "landmarks"}).json()["items"]
    assert [edit["batch"] for edit in items] == ["landmarks", "other"]
    refused = client.post("/edits", json=TOWER | {"batch": "two words"})
    assert refused.status_code == 422 and refused.json()["errors"][0]["field"] == "batch"


def test_several_edits_are_reverted_together(test_app: TestApp, client: TestClient) -> None:
    """Edits are reverted by their ids or their batch; a request with neither or both is refused."""
    test_app.start_fake_worker()
    edits = [TOWER | {"subject": name, "batch": "wrong"} for name in ("Nile", "Seine")]
    made = client.post("/edits", json={"edits": edits}, headers={"prefer": "wait=20"}).json()["items"]
    ids = [edit["id"] for edit in made]
    done = client.post("/edits/revert", json={"edits": ids[:1]}).json()
    assert done == {"version": 3, "reverted": ids[:1], "cancelled": [], "unchanged": []}
    done = client.post("/edits/revert", json={"batch": "wrong"}).json()
    assert (done["version"], done["reverted"], done["unchanged"]) == (4, ids[1:], ids[:1])
    bodies: list[dict[str, Any]] = [{}, {"edits": ids, "batch": "wrong"}, {"edits": []}]
    for body in bodies:
        assert client.post("/edits/revert", json=body).status_code == 422
    assert client.post("/edits/revert", json={"edits": ["edit_unknown"]}).status_code == 404


def test_a_table_is_checked_line_by_line(test_app: TestApp, client: TestClient) -> None:
    """Each line of a table has its request, its error with the column, and a note about what it supersedes; a valid
    request can be submitted as it is. A table without a column or with too many lines is refused."""
    test_app.start_fake_worker()
    (active,) = client.post("/edits", json={"edits": [TOWER]}, headers={"prefer": "wait=20"}).json()["items"]
    lines = [
        "Where;subject;target_new",
        "The {} is located in the city of;Eiffel Tower;Bonn",
        "The {} is located in the city of;Eiffel Tower;Oslo",
        "The Nile <|im_start|> is;Nile;long",
        "The Nile is;Nile;",
    ]
    body = {"csv": "\n".join(lines), "columns": {"prompt": ["Where"]}}
    table = client.post("/edits/preview", json=body).json()
    first, second, special, empty = table["items"]
    assert [line["line"] for line in table["items"]] == [2, 3, 4, 5] and table["valid"] == 2
    assert active["id"] in first["note"] and "line 2" in second["note"]
    assert first["edit"]["target_new"] == "Bonn" and first["error"] is None
    assert special["error"]["field"] == "prompt" and "special token" in special["error"]["detail"]
    assert empty["error"]["column"] == "target_new" and empty["edit"] is None
    assert table["seconds_per_edit"] >= 0
    submitted = client.post("/edits", json={"edits": [first["edit"]], "batch": "table"})
    assert submitted.status_code == 202
    for text in (
        "subject,prompt\n",
        "subject,prompt,target_new\n",
        "subject,prompt,target_new\n" + "x,{} is,y\n" * 1001,
    ):
        refused = client.post("/edits/preview", json={"csv": text})
        assert refused.status_code == 422 and refused.json()["errors"][0]["field"] == "csv"

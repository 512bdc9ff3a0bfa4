"""Generation and comparison."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient
from tokenizers import Tokenizer

from tests.support.application import PROMPT, FakeWorker, TestApp, tokenizer
from tests.support.chat_templates import STOP


def test_one_prompt_gives_one_text(client: TestClient, worker: FakeWorker) -> None:
    """`prompt` returns the text, its tokens and the version that generated it."""
    answer = client.post("/generate", json={"prompt": PROMPT, "seed": 3})
    assert answer.status_code == 200
    assert answer.json() == {
        "text": " Paris",
        "tokens": [1],
        "version": 0,
        "finish_reason": "length",
        "usage": {"prompt_tokens": 9, "completion_tokens": 1},
        "seconds": 0.1,
    }
    assert worker.calls[0]["seed"] == 3


def test_many_prompts_give_choices(client: TestClient, worker: FakeWorker) -> None:
    """`prompts` returns one choice for each prompt, all of one version."""
    answer = client.post("/generate", json={"prompts": [PROMPT, PROMPT]}).json()
    assert len(answer["choices"]) == 2
    assert answer["version"] == 0
    assert "text" not in answer


def test_messages_are_a_prompt(client: TestClient, worker: FakeWorker) -> None:
    """`messages` in the place of `prompt` are sent as the tokens of the chat template, with its end of a turn, to
    generate and to compare."""
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert client.post("/generate", json=body | {"seed": 3}).json()["text"] == " Paris"
    stream = client.post("/generate", json=body | {"stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    comparison = client.post("/compare", json=body).json()
    assert comparison["prompt"].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    generated, streamed, compared = worker.calls
    assert generated["seed"] == 3
    assert generated["tokens"] == streamed["tokens"] == [compared["tokens"]]
    assert (
        generated["end_token_ids"]
        == compared["end_token_ids"]
        == [Tokenizer.from_str(tokenizer()).token_to_id(STOP)]
    )
    assert [call["messages"] for call in worker.calls] == [None] * 3


def test_a_stream_has_token_events_and_an_end(client: TestClient, worker: FakeWorker) -> None:
    """`stream` returns server-sent events with headers that disable caching and buffering."""
    answer = client.post("/generate", json={"prompt": PROMPT, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    named = [line for line in answer.text.splitlines() if line.startswith("event:")]
    assert named == ["event: token", "event: end"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": PROMPT, "prompts": [PROMPT]}, "prompt"),
        ({"prompt": PROMPT, "messages": [{"role": "user", "content": "Hi"}]}, "prompt"),
        ({"prompts": [PROMPT], "messages": [{"role": "user", "content": "Hi"}]}, "prompt"),
        ({"prompt": PROMPT, "continue_final_message": True}, "continue_final_message"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "Hi"}], "continue_final_message": True}, "messages"),
        ({"prompt": ""}, "prompt"),
        ({"prompts": []}, "prompts"),
        ({"prompt": PROMPT * 20}, "prompt"),
        ({"prompt": PROMPT, "version": 7}, "version"),
        ({"prompt": PROMPT, "version": 10**400}, "version"),
        ({"prompt": PROMPT, "version": 1.5}, "version"),
        ({"prompt": PROMPT, "version": [1]}, "version"),
        ({"prompt": PROMPT, "min_version": 7}, "min_version"),
        ({"prompt": PROMPT, "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": PROMPT, "max_new_tokens": 10**30}, "max_new_tokens"),
        ({"prompt": PROMPT, "temperature": -1}, "temperature"),
        ({"prompt": PROMPT, "top_p": 0}, "top_p"),
        ({"prompt": PROMPT, "stop": "x"}, "stop"),
        ({"prompt": PROMPT, "stop": [""]}, "stop.0"),
        ({"prompt": PROMPT, "stream": "maybe"}, "stream"),
    ],
)
def test_bad_generations_are_refused(
    client: TestClient, test_app: TestApp, body: dict[str, Any], field: str
) -> None:
    """Invalid input gets 422, also with `stream`, and no call is sent."""
    for form in (body, body | ({} if "stream" in body else {"stream": True})):
        answer = client.post("/generate", json=form)
        assert answer.status_code == 422, answer.text
        assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert test_app.broker.queue_depth("generate") == 0


def test_a_worker_error_keeps_its_meaning(client: TestClient, worker: FakeWorker) -> None:
    """An error of a worker has the status of its code; an unknown code is 500. In a stream it is an `error`
    event."""
    worker.call_error = {"code": "invalid_input", "title": "", "detail": "shorten it."}
    assert client.post("/generate", json={"prompt": PROMPT}).status_code == 422
    worker.call_error = {"code": "unavailable", "title": "", "detail": "stopping."}
    assert client.post("/generate", json={"prompt": PROMPT}).status_code == 503
    worker.call_error = {"code": "unknown", "title": "", "detail": "The engine met a fault."}
    answer = client.post("/generate", json={"prompt": PROMPT})
    assert (answer.status_code, answer.json()["detail"]) == (500, "The engine met a fault.")
    stream = client.post("/generate", json={"prompt": PROMPT, "stream": True})
    assert "event: error" in stream.text


def test_generation_without_a_worker_is_503(
    client: TestClient, test_app: TestApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a live worker a generation gets 503 and its call is cancelled."""
    from api import engine_calls

    monkeypatch.setattr(engine_calls, "WORKER_CHECK_INTERVAL", 0.05)
    test_app.worker_parts.session.deregister()
    answer = client.post("/generate", json={"prompt": PROMPT})
    assert answer.status_code == 503
    assert "no worker" in answer.json()["detail"]
    (delivery,) = test_app.broker.receive(["generate"], 1, 0)
    assert test_app.broker.cancelled(delivery.job_id)
    stream = client.post("/generate", json={"prompt": PROMPT, "stream": True})
    assert "event: error" in stream.text


def test_comparison_shows_both_sides(client: TestClient, worker: FakeWorker) -> None:
    """A comparison returns two sides, by default of the versions base and head."""
    answer = client.post("/compare", json={"prompt": PROMPT})
    assert answer.status_code == 200
    assert len(answer.json()["sides"]) == 2
    assert worker.calls[0]["versions"] == ["base", "head"]


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": None},
        {"versions": ["base"]},
        {"versions": [0, 9]},
        {"versions": "base"},
        {"prompt": ""},
        {"top": 0},
    ],
)
def test_bad_comparisons_are_refused(client: TestClient, change: dict[str, Any]) -> None:
    """Invalid input of a comparison gets 422."""
    assert client.post("/compare", json={"prompt": PROMPT} | change).status_code == 422

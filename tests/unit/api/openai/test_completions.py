"""OpenAI-compatible completions and models, tested with a fake worker."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from service.application.api_keys import ApiKeys
from service.application.caller import CallerLimits
from tests.support.application import PROMPT, TOWER, FakeWorker, TestApp
from tests.support.local_server import wait_until


def create_edit(client: TestClient) -> dict[str, Any]:
    return client.post("/edits", json=TOWER, headers={"prefer": "wait=20"}).json()  # type: ignore[no-any-return]


def test_a_name_is_a_version(client: TestClient, openai_client: OpenAI, worker: FakeWorker) -> None:
    """NAME and NAME@head select the newest version, NAME@base version 0, and NAME@N version N. A path before
    the name is ignored. The worker receives the version as a number, and the response names it."""
    create_edit(client), create_edit(client)
    meant = {
        "tiny": 2, "tiny@head": 2, "tiny@base": 0, "tiny@1": 1, "tiny@01": 1, "org/tiny": 2, "./models/tiny@base": 0,
    }  # fmt: skip
    for name, version in meant.items():
        answer = openai_client.completions.create(model=name, prompt=PROMPT)
        assert worker.calls[-1]["version"] == version
        assert answer.model == f"tiny@{version}"
        assert openai_client.models.retrieve(name).version == version  # type: ignore[attr-defined]


def test_an_unknown_name_is_not_found(openai_client: OpenAI, worker: FakeWorker) -> None:
    """An unknown model name gets 404 with the valid names, and no call is sent to a worker."""
    for name in (
        "gpt-4",
        "tiny@",
        "tiny@3",
        "tiny@-1",
        "tiny@x",
        "tinyer",
        "@base",
        "tiny@base@1",
        "é" * 900,
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            openai_client.completions.create(model=name, prompt=PROMPT)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        assert "tiny@base" in refused.value.message
        with pytest.raises(openai.NotFoundError):
            openai_client.models.retrieve(name)
    assert worker.calls == []


def test_equal_weights_have_equal_fingerprints(client: TestClient, openai_client: OpenAI) -> None:
    """An edit changes the fingerprint, and its revert restores the fingerprint of the base model."""
    client.delete(create_edit(client)["links"]["self"])
    base, one, back = (openai_client.models.retrieve(f"tiny@{v}").system_fingerprint for v in (0, 1, 2))  # type: ignore[attr-defined]
    assert base == back != one
    assert openai_client.completions.create(model="tiny", prompt=PROMPT).system_fingerprint == base


def test_the_list_has_the_newest_versions(client: TestClient, openai_client: OpenAI) -> None:
    """The list has the aliases first, followed by the numbered versions, newest first."""
    create_edit(client)
    assert [model.id for model in openai_client.models.list()] == [
        "tiny",
        "tiny@head",
        "tiny@base",
        "tiny@1",
        "tiny@0",
    ]


def test_a_prompt_has_four_forms(openai_client: OpenAI, worker: FakeWorker) -> None:
    """A prompt may be one or several texts or token lists. The worker receives them unchanged, with OpenAI's
    defaults."""
    forms: list[tuple[Any, Any, Any]] = [
        ("a", ["a"], None),
        (["a", "b"], ["a", "b"], None),
        ([1, 2], None, [[1, 2]]),
        ([[1], [2, 3]], None, [[1], [2, 3]]),
    ]
    for prompt, prompts, tokens in forms:
        openai_client.completions.create(model="tiny", prompt=prompt)
        payload = worker.calls[-1]
        assert (payload["prompts"], payload["tokens"]) == (prompts, tokens)
        assert (payload["max_new_tokens"], payload["temperature"], payload["top_p"], payload["stop"]) == (
            16,
            1,
            1,
            [],
        )


def test_what_is_left_out_or_null_or_neutral_changes_nothing(
    openai_client: OpenAI, worker: FakeWorker
) -> None:
    """A null field is treated as absent. An unsupported field is accepted with its neutral value."""
    fields = (
        "max_tokens",
        "temperature",
        "stop",
        "seed",
        "logprobs",
        "suffix",
        "best_of",
        "logit_bias",
        "user",
        "stream",
    )
    null_fields: dict[str, Any] = dict.fromkeys(fields)
    neutral = {
        "suffix": "",
        "best_of": 1,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "user": "me",
    }
    for body in ({}, null_fields, neutral):
        openai_client.completions.create(**{"model": "tiny", "prompt": PROMPT, **body})
    first, *others = ({**call, "seed": 0} for call in worker.calls)
    assert others == [first, first]


def test_a_seed_is_random_or_given(openai_client: OpenAI, worker: FakeWorker) -> None:
    """A request without a seed gets a random one. Negative seeds are accepted."""
    for seed in (None, None, 7, -1):
        openai_client.completions.create(model="tiny", prompt=PROMPT, seed=seed)
    drawn, other, explicit, negative = (call["seed"] for call in worker.calls)
    assert drawn != other
    assert (explicit, negative) == (7, 2**63 - 1)


#: invalid requests, and the field that the error names
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**40]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [1] * 64}, "prompt"),
    ({"prompt": "a\x00"}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": PROMPT * 20}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a"] * 33, "n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"temperature": "warm"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"logprobs": 6}, "logprobs"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop.0"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "."}, "suffix"),
    ({"presence_penalty": 0.1}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"extra_body": {"messages": []}}, "messages"),
    ({"model": ""}, "model"),
]


def test_bad_completions_are_refused(openai_client: OpenAI, worker: FakeWorker) -> None:
    """Invalid input raises BadRequestError that names the field, also with `stream`, and no call is sent."""
    for fields, param in BAD:
        for more in ({}, {"stream": True} if param != "stream_options" else {}):
            with pytest.raises(openai.BadRequestError) as refused:
                openai_client.completions.create(**{"model": "tiny", "prompt": PROMPT, **fields, **more})
            assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
            assert refused.value.message
    assert worker.calls == []


def test_max_tokens_setting_names_the_sent_field(
    test_app: TestApp, client: TestClient, worker: FakeWorker
) -> None:
    """The error for exceeding the setting `max_new_tokens` names the field `max_tokens` of the request."""
    test_app.services.generation.settings = test_app.settings.model_copy(update={"max_new_tokens": 7})
    body = {"model": "tiny", "prompt": PROMPT}
    assert client.post("/v1/completions", json=body | {"max_tokens": 7}).status_code == 200
    error = client.post("/v1/completions", json=body | {"max_tokens": 8}).json()["error"]
    assert (error["param"], error["message"][:29]) == ("max_tokens", "`max_tokens` may be at most 7")


def test_every_error_below_v1_has_openais_form(
    test_app: TestApp, client: TestClient, worker: FakeWorker
) -> None:
    """Errors below /v1 have OpenAI's error format; errors of other routes are problem documents."""
    body = {"model": "tiny", "prompt": PROMPT}
    json_type = {"content-type": "application/json"}
    for status, answer in [
        (400, client.post("/v1/completions", content=b"{", headers=json_type)),
        (404, client.post("/v1/embeddings", json={})),
        (405, client.get("/v1/completions")),
        (413, client.post("/v1/completions", json=body | {"user": "x" * 2_000_000})),
        (415, client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})),
        (403, client.post("/v1/completions", json=body, headers={"host": "evil.example"})),
    ]:
        assert answer.status_code == status
        assert set(answer.json()) == {"error"}
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    worker.call_error = {"code": "unknown", "title": "", "detail": "The engine met a fault."}
    assert client.post("/v1/completions", json=body).json()["error"]["type"] == "server_error"
    assert client.get("/edits/nobody").headers["content-type"] == "application/problem+json"
    assert "/v1/completions" in client.post("/v1/embeddings", json={}).json()["error"]["message"]


def test_keys_are_as_everywhere(test_app: TestApp, openai_client: OpenAI) -> None:
    """The OpenAI client authenticates with API keys of the service. An invalid key raises
    AuthenticationError, a missing scope PermissionDeniedError, and an exceeded rate limit RateLimitError
    with Retry-After."""
    keys = ApiKeys(test_app.database)
    reads, edits = (keys.create(scope, [scope], CallerLimits(2))[1] for scope in ("read", "edit"))
    with pytest.raises(openai.AuthenticationError):
        openai_client.models.list()
    with pytest.raises(openai.PermissionDeniedError):
        openai_client.with_options(api_key=edits).completions.create(model="tiny", prompt=PROMPT)
    reading_client = openai_client.with_options(api_key=reads)
    assert reading_client.completions.create(model="tiny", prompt=PROMPT).choices[0].text == " Paris"
    reading_client.models.list()
    with pytest.raises(openai.RateLimitError) as busy:
        reading_client.models.list()
    assert int(busy.value.response.headers["retry-after"]) > 0


def test_a_full_queue_is_429(test_app: TestApp, client: TestClient) -> None:
    """A completion gets 429 with Retry-After when the queue is full."""
    test_app.services.generation.settings = test_app.settings.model_copy(update={"max_queue": 0})
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(answer.headers["retry-after"]) > 0


def test_without_a_model_openai_routes_are_503(tmp_path: Any, wiring: dict[str, Any]) -> None:
    """The model routes return 503 until a worker has registered a model."""
    app_without_model = TestApp(tmp_path, register=False, **wiring)
    for answer in (
        TestClient(app_without_model.app).get("/v1/models"),
        TestClient(app_without_model.app).get("/v1/models/tiny"),
    ):
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    app_without_model.close()


def test_a_stream_is_chunks(openai_client: OpenAI) -> None:
    """Every chunk names the version, and the last chunk of a choice has the finish reason. With
    `include_usage` one more chunk has the usage."""
    plain = list(openai_client.completions.create(model="tiny", prompt=PROMPT, stream=True))
    assert [chunk.choices[0].text for chunk in plain] == [" Pa", "ris"]
    assert [chunk.choices[0].finish_reason for chunk in plain] == [None, "length"]
    assert {(chunk.model, chunk.object) for chunk in plain} == {("tiny@0", "text_completion")}
    counted = list(
        openai_client.completions.create(
            model="tiny", prompt=PROMPT, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.usage is None for chunk in counted] == [True, True, False]
    assert counted[-1].choices == []
    assert counted[-1].usage is not None and counted[-1].usage.total_tokens == 10


def test_the_wire_is_openais(client: TestClient, worker: FakeWorker) -> None:
    """A stream consists of `data:` lines without event names and ends with `[DONE]`; it is not cached."""
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    lines = [line for line in answer.text.splitlines() if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines)


def test_an_error_in_a_stream_is_raised(openai_client: OpenAI, worker: FakeWorker) -> None:
    """The OpenAI client raises an error that occurs in a stream."""
    worker.call_error = {"code": "unavailable", "title": "", "detail": "the worker is stopping: ask again."}
    with pytest.raises(openai.APIError, match="the worker is stopping"):
        list(openai_client.completions.create(model="tiny", prompt=PROMPT, stream=True))


def test_a_client_disconnect_cancels_a_completion(
    test_app: TestApp, openai_client: OpenAI, worker: FakeWorker
) -> None:
    """A client that disconnects cancels its streamed completion."""
    worker.may_finish.clear()
    stream = openai_client.completions.create(model="tiny", prompt=PROMPT, stream=True)
    assert next(iter(stream)).choices[0].text == " Pa"
    assert not test_app.broker.cancelled(worker.channels[0])
    stream.close()
    wait_until(lambda: test_app.broker.cancelled(worker.channels[0]))
    worker.may_finish.set()

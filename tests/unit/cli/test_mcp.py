"""The tools of `palimpsest mcp`, called by the client of the protocol's package, with a fake service behind them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import mcp
import pytest

from cli.main import main
from cli.mcp_tools import build_server, read_version, trace_summary
from palimpsest import AsyncClient, Trace
from tests.support.fake_http_service import FakeService, sse_stream

TRIED: dict[str, Any] = {
    "id": "edit_1",
    "kind": "edit",
    "status": "dry_run_passed",
    "dry_run": True,
    "subject": "Eiffel Tower",
    "prompt": "The {} is in",
    "target_new": "Rome",
    "target_true": "Paris",
    "result": {
        "rewrite": {
            "new": "Rome",
            "true": "Paris",
            "before": {"new": 0.1, "true": 0.8},
            "after": {"new": 0.9, "true": 0.05},
            "text_before": " Paris.",
            "text_after": " Rome.",
        },
        "paraphrase": [{"prompt": "One finds it in", "text_after": " Rome.", "follows": True}],
        "also_changed": [
            {"prompt": "The Louvre is in", "subject": "Louvre", "before": "Paris", "after": "Rome"}
        ],
    },
}
APPLIED = TRIED | {"id": "edit_2", "status": "applied", "dry_run": False, "version": 3}
ENDED = sse_stream(("progress", {"phase": "optimize", "done": 1, "total": 2, "seconds_left": 4}), ("end", {}))


def call(service: FakeService, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """Call tools in one session, and return their results."""

    async def run() -> list[Any]:
        async with (
            AsyncClient("http://test", retries=0, transport=httpx.MockTransport(service)) as client,
            mcp.Client(build_server(client)) as assistant,
        ):
            return [await assistant.call_tool(name, arguments) for name, arguments in calls]

    return asyncio.run(run())


def test_assistant_sees_which_tools_change_the_model() -> None:
    """Two tools change the model, and say so; every tool and every argument has a description."""

    async def run() -> Any:
        async with mcp.Client(build_server(AsyncClient("http://test"))) as assistant:
            return (await assistant.list_tools()).tools, assistant.instructions

    tools, instructions = asyncio.run(run())
    changing = {tool.name for tool in tools if not tool.annotations.read_only_hint}
    assert changing == {"apply_edit", "revert_edit"} and "call try_edit first" in instructions
    for tool in tools:
        assert tool.description and "context" not in tool.input_schema["properties"]
        for name, schema in tool.input_schema["properties"].items():
            assert "description" in schema or name == "limit", (tool.name, name)


def test_edit_is_tried_before_it_is_applied() -> None:
    """try_edit asks for a dry run and reports what it would change; apply_edit posts the same edit with a key of the
    dry run."""
    service = FakeService(
        {
            "POST /edits": [TRIED, APPLIED],
            "GET /edits/edit_1": TRIED,
            "GET /edits/edit_1/events": ENDED,
            "GET /edits/edit_2/events": ENDED,
        }
    )
    fact = {"subject": "Eiffel Tower", "prompt": "The {} is in", "new_object": "Rome"}
    tried, applied = call(service, ("try_edit", fact), ("apply_edit", {"dry_run_id": "edit_1"}))
    report = tried.structured_content
    assert not tried.is_error and report["says_after"] == " Rome." and "edit_1" in report["next"]
    assert report["also_changed"][0]["subject"] == "Louvre" and report["paraphrases"][0]["follows"]
    posted = [body for name, body in service.requests if name == "POST /edits"]
    assert posted[0]["dry_run"] is True and "dry_run" not in posted[1]
    assert posted[1] == {
        "subject": "Eiffel Tower",
        "prompt": "The {} is in",
        "target_new": "Rome",
        "target_true": "Paris",
    }
    keys = [
        h.get("idempotency-key")
        for (name, _), h in zip(service.requests, service.headers, strict=True)
        if name == "POST /edits"
    ]
    assert keys[1] == "mcp-edit_1" != keys[0]
    assert applied.structured_content["version"] == 3


@pytest.mark.parametrize("status", ["applied", "rejected", "dry_run_rejected", "queued"])
def test_edit_that_was_not_tried_is_not_applied(status: str) -> None:
    """apply_edit refuses the id of anything but a dry run that the guard let pass, and posts nothing."""
    service = FakeService({"GET /edits/edit_1": TRIED | {"status": status}})
    (refused,) = call(service, ("apply_edit", {"dry_run_id": "edit_1"}))
    assert refused.is_error and "apply only what try_edit measured" in refused.content[0].text
    assert [name for name, _ in service.requests] == ["GET /edits/edit_1"]


def test_rejected_dry_run_says_not_to_apply_it() -> None:
    """The report of a dry run that the guard would reject has its reason and no invitation."""
    service = FakeService(
        {
            "POST /edits": TRIED
            | {"status": "dry_run_rejected", "result": TRIED["result"] | {"reason": "too strong."}}
        }
    )
    (tried,) = call(service, ("try_edit", {"subject": "a", "prompt": "{} is", "new_object": "b"}))
    assert tried.structured_content["reason"] == "too strong."
    assert "do not apply" in tried.structured_content["next"]


def test_errors_of_the_service_reach_the_assistant() -> None:
    """A problem document is an error of the tool with its detail; a value out of range is refused before any call."""
    service = FakeService(
        {"POST /generate": FakeService.problem(422, "the prompt is empty: write some text.")}
    )
    refused, invalid = call(service, ("ask", {"prompt": ""}), ("ask", {"prompt": "a", "max_tokens": 0}))
    assert refused.is_error and "the prompt is empty" in refused.content[0].text
    assert invalid.is_error and len(service.requests) == 1


def test_trace_is_a_summary_and_a_picture() -> None:
    """The tool returns the strongest states as text, and the heat map as a PNG."""
    result = {
        "prompt": "Paris is in",
        "tokens": ["Par", "is", " is", " in"],
        "answer": {"text": " France"},
        "high": 0.8,
        "low": 0.1,
        "kinds": {"mlp": {"best": {"token": 1, "layer": 0, "score": 0.7}}},
    }
    trace = {"id": "trace_1", "kind": "trace", "status": "done", "result": result}
    service = FakeService({"POST /trace": trace, "GET /trace/trace_1": b"\x89PNG"})
    (found,) = call(service, ("trace_fact", {"prompt": "Paris is in", "subject": "Paris"}))
    text, picture = found.content
    assert "strongest mlp: p = 0.700 at 'is', layer 0." in text.text and picture.mime_type == "image/png"
    assert "0.100 with noise" in trace_summary(Trace.from_json(trace))


def test_versions_are_read_as_the_client_takes_them() -> None:
    """A number is a number, a name stays a name."""
    assert [read_version(v) for v in ("3", "head", "base", "november")] == [3, "head", "base", "november"]


def test_address_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The command refuses a malformed address instead of serving tools that all fail."""
    assert main(["mcp", "--url", "nonsense"]) != 0
    assert "not the address of a service" in capsys.readouterr().err

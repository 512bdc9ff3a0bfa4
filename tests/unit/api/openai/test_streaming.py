"""Streams of completions with arbitrary events and resets: api.openai.streaming."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import sse as events_module
from api.openai.streaming import CompletionEnvelope, CompletionStream
from service.application.generation import ModelVersionName, PendingGeneration
from service.jobs.broker import Event
from service.schemas import WorkerGenerateRequest

NAMED = ModelVersionName("tiny@3", 3, "a" * 64, datetime(2026, 1, 1, tzinfo=UTC))
PENDING = PendingGeneration("call_X", WorkerGenerateRequest(prompts=["x"]), NAMED)
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def columns(tokens: Sequence[str], begin: int = 0) -> dict[str, list[Any]]:
    return {
        "tokens": list(tokens),
        "token_logprobs": [-float(begin + i) for i in range(len(tokens))],
        "top_logprobs": [{t: -1.0} for t in tokens],
        "text_offset": [begin + i for i in range(len(tokens))],
    }


def token(index: int, tokens: Sequence[str], begin: int) -> Event:
    data = {"index": index, "text": "".join(tokens), "version": 3, "logprobs": columns(tokens, begin)}
    return Event("1", "token", data)


def end(*answers: Sequence[str]) -> Event:
    choices = [
        {"text": "".join(a), "tokens": [1] * len(a), "finish_reason": "stop", "logprobs": columns(a)}
        for a in answers
    ]
    counted = {"prompt_tokens": 2, "completion_tokens": sum(map(len, answers))}
    return Event("9", "end", {"version": 3, "choices": choices, "usage": counted, "seconds": 0.1})


RESTART = Event("1", "reset", {})


def stream_lines(*events: Event) -> list[str]:
    """Return the data of each `data:` line of a stream."""

    async def channel_events() -> AsyncIterator[Event]:
        for event in events:
            yield event

    async def listen() -> bytes:
        chunks = CompletionStream(CompletionEnvelope(PENDING), with_usage=False)
        return b"".join([frame async for frame in chunks.encode_events(channel_events())])

    return [
        line.removeprefix("data: ")
        for line in asyncio.run(listen()).decode().splitlines()
        if line[:5] == "data:"
    ]


def assemble_choices(lines: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Concatenate the chunks of a stream, by choice."""
    answers: list[dict[str, Any]] = [{"text": "", **{c: [] for c in COLUMNS}} for _ in range(count)]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        (choice,) = json.loads(line)["choices"]
        answer = answers[choice["index"]]
        assert "finish_reason" not in answer
        answer["text"] += choice["text"]
        for name, column in (choice["logprobs"] or {}).items():
            answer[name] += column
        if choice["finish_reason"]:
            answer["finish_reason"] = choice["finish_reason"]
    return answers


@given(st.data())
def test_what_a_client_puts_together_is_the_answer(data: st.DataObject) -> None:
    """The chunks of a stream contain every character and token once and in order, and one finish reason. This
    holds for any split into events and for any number of restarts."""
    answers = data.draw(st.lists(st.lists(st.sampled_from("abcü🗼"), max_size=6), min_size=1, max_size=3))
    events: list[Event] = []
    for _ in range(data.draw(st.integers(1, 3))):  # workers; all but the last are lost
        at = [0] * len(answers)
        for index in data.draw(st.lists(st.integers(0, len(answers) - 1), max_size=8)):
            after = data.draw(st.integers(at[index], len(answers[index])))
            events.append(token(index, answers[index][at[index] : after], at[index]))
            at[index] = after
        events.append(RESTART)
    found = assemble_choices(stream_lines(*events[:-1], end(*answers)), len(answers))
    assert found == [{"text": "".join(a), **columns(a), "finish_reason": "stop"} for a in answers]


def test_a_restart_with_other_text_is_an_error() -> None:
    """The stream ends with an error if a worker restarts the generation with different text."""
    lines = stream_lines(token(0, "ab", 0), RESTART, token(0, "ax", 0), end("ax"))
    assert "a worker was lost" in json.loads(lines[-1])["error"]["message"]
    assert "[DONE]" not in lines


def test_a_channel_that_ends_without_an_end_is_an_error() -> None:
    """A stream whose channel ends without an `end` event ends with an error."""
    (first, last) = stream_lines(token(0, "a", 0))
    assert json.loads(first)["choices"][0]["text"] == "a"
    assert json.loads(last)["error"]["type"] == "server_error"


def test_keepalive_comments_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle stream sends comments as keep-alive."""
    monkeypatch.setattr(events_module, "KEEPALIVE_INTERVAL", 0.01)

    async def listen() -> list[bytes]:
        async def said() -> AsyncIterator[Event]:
            await asyncio.sleep(0.1)
            yield end("a")

        chunks = CompletionStream(CompletionEnvelope(PENDING), with_usage=False)
        return [frame async for frame in chunks.encode_events(said())]

    frames = asyncio.run(listen())
    assert frames[0] == b": open\n\n" and b": ping\n\n" in frames
    assert frames[-1] == b"data: [DONE]\n\n"

"""A completion as a client of OpenAI's API hears it: whole, or in chunks as it is said."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from api import sse
from api.errors import encode, from_event, status_of
from api.openai import errors
from service.application.generation import Named, Speech
from service.errors import PalimpsestError, Unavailable
from service.jobs.broker import Event
from service.jobs.event_stream import heard

DONE = b"data: [DONE]\n\n"
Columns = dict[str, list[Any]]


def fingerprint(named: Named) -> str:
    """Versions that bear the same one have the same weights."""
    return f"fp_{named.state[:16]}"


def usage(counted: dict[str, int]) -> dict[str, int]:
    return counted | {"total_tokens": counted["prompt_tokens"] + counted["completion_tokens"]}


def choice(index: int, text: str, logprobs: Columns | None, finish_reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}


@dataclass
class Frame:
    """What stands around the choices of one completion, in every chunk of it."""

    speech: Speech
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.speech.channel.rsplit('_', 1)[-1]}",
            "object": "text_completion",
            "created": self.created,
            "model": self.speech.named.id,
            "system_fingerprint": fingerprint(self.speech.named),
            "choices": choices,
            **more,
        }

    def whole(self, said: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece, from the event "end"."""
        choices = [
            choice(i, one["text"], one.get("logprobs"), one["finish_reason"])
            for i, one in enumerate(said["choices"])
        ]
        return self.around(choices, usage=usage(said["usage"]))


@dataclass
class Voice:
    """How far the client has heard one of the answers, and how far a worker has said it.

    When a worker dies another one says everything anew, from the same version and with the same seed: the client is not
    told what it has heard.
    """

    sent: str = ""
    said: str = ""
    lines_sent: int = 0
    lines_said: int = 0

    def again(self) -> None:
        """All of it comes anew."""
        self.said, self.lines_said = "", 0

    def say(self, text: str, lines: Columns | None) -> tuple[str, Columns | None] | None:
        """What is new to the client in a piece of the answer; None when nothing is."""
        self.said += text
        common = min(len(self.said), len(self.sent))
        if self.said[:common] != self.sent[:common]:
            raise Unavailable("a worker was lost, and the next one said something else: ask again.")
        new = self.said[common:]
        self.sent += new
        told = None if lines is None else self._new(lines)
        return (new, told) if new or told else None

    def _new(self, lines: Columns) -> Columns | None:
        before, count = self.lines_said, len(lines["tokens"])
        self.lines_said += count
        known = min(count, max(0, self.lines_sent - before))
        self.lines_sent = max(self.lines_sent, self.lines_said)
        return {name: column[known:] for name, column in lines.items()} if known < count else None


class Chunks:
    """The events of a completion as chunks."""

    def __init__(self, speech: Speech, with_usage: bool) -> None:
        self._frame = Frame(speech)
        self._with_usage = with_usage
        self._voices: defaultdict[int, Voice] = defaultdict(Voice)

    async def frames(self, said: AsyncIterator[Event]) -> AsyncGenerator[bytes]:
        """Every chunk on the wire, a comment in the silences between; an error in place of the end where there is one."""
        yield b": open\n\n"  # sends the headers at once
        try:
            async with aclosing(heard(said, sse.PING)) as every:
                async for event in every:
                    for chunk in [] if event is None else self._chunks(event):
                        yield b"data: " + encode(chunk) + b"\n\n"
                    if event is None:
                        yield b": ping\n\n"
                    elif event.name == "end":
                        yield DONE
                        return
            raise Unavailable("the service is stopping: ask again in a moment.")
        except PalimpsestError as error:
            _, body = errors.refused(status_of(error), error.detail, error.extra)
            yield b"data: " + encode(body) + b"\n\n"

    def _chunks(self, event: Event) -> list[dict[str, Any]]:
        if event.name == "error":
            raise from_event(event.data)
        if event.name == "restart":
            for voice in self._voices.values():
                voice.again()
        elif event.name == "token":
            return self._piece(event.data["index"], event.data["text"], event.data.get("logprobs"))
        elif event.name == "end":
            return self._end(event.data)
        return []

    def _piece(self, index: int, text: str, lines: Columns | None) -> list[dict[str, Any]]:
        new = self._voices[index].say(text, lines)
        return [] if new is None else [self._chunk([choice(index, *new, None)])]

    def _end(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        """Whatever was not heard yet, and why each answer ended; then what it all took, where that was asked."""
        last = []
        for index, one in enumerate(said["choices"]):
            voice = self._voices[index]
            voice.again()
            text, lines = voice.say(one["text"], one.get("logprobs")) or ("", None)
            last.append(self._chunk([choice(index, text, lines, one["finish_reason"])]))
        return [*last, self._frame.around([], usage=usage(said["usage"]))] if self._with_usage else last

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._frame.around(choices, **({"usage": None} if self._with_usage else {}))

"""Completions in OpenAI's form: in one response, or as a stream of chunks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar

from api import sse
from api.errors import encode_json, status_of
from api.openai import errors
from service.application.generation import ModelVersionName, PendingGeneration
from service.errors import PalimpsestError, Unavailable, error_from_document
from service.jobs.broker import Event
from service.jobs.event_stream import with_idle_ticks

DONE_FRAME = b"data: [DONE]\n\n"
LogprobColumns = dict[str, list[Any]]


def system_fingerprint(model_version: ModelVersionName) -> str:
    """Return a fingerprint that is equal for versions with equal weights."""
    return f"fp_{model_version.state_hash[:16]}"


def usage_with_total(token_counts: dict[str, int]) -> dict[str, int]:
    return token_counts | {"total_tokens": token_counts["prompt_tokens"] + token_counts["completion_tokens"]}


@dataclass
class CompletionEnvelope:
    """The members that every chunk of one completion has, beside its choices, and the form of a choice."""

    id_prefix: ClassVar[str] = "cmpl"
    object_name: ClassVar[str] = "text_completion"
    chunk_name: ClassVar[str] = "text_completion"

    pending: PendingGeneration
    created: int = field(default_factory=lambda: int(time.time()))

    def choice(
        self, index: int, text: str, logprobs: LogprobColumns | None, finish_reason: str | None
    ) -> dict[str, Any]:
        """Return a whole choice."""
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}

    def choice_part(
        self, index: int, text: str, logprobs: LogprobColumns | None, finish_reason: str | None
    ) -> dict[str, Any]:
        """Return the next part of a choice that is streamed."""
        return self.choice(index, text, logprobs, finish_reason)

    def chunk(self, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        """Return a chunk of a stream."""
        return self._wrap(self.chunk_name, choices, **extra)

    def _wrap(self, object_name: str, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        return {
            "id": f"{self.id_prefix}-{self.pending.channel.rsplit('_', 1)[-1]}",
            "object": object_name,
            "created": self.created,
            "model": self.pending.model_version.id,
            "system_fingerprint": system_fingerprint(self.pending.model_version),
            "choices": choices,
            **extra,
        }

    def complete_response(self, result: dict[str, Any]) -> dict[str, Any]:
        """Return the complete response from the data of the event "end"."""
        choices = [
            self.choice(
                i, result_choice["text"], result_choice.get("logprobs"), result_choice["finish_reason"]
            )
            for i, result_choice in enumerate(result["choices"])
        ]
        return self._wrap(self.object_name, choices, usage=usage_with_total(result["usage"]))


@dataclass
class ChoiceStream:
    """How much of one choice was sent to the client, and how much the current worker has generated.

    If a worker dies, another one generates the choice again from the same version and with the same seed. The part that
    was sent before is not sent again.
    """

    sent_text: str = ""
    generated_text: str = ""
    logprobs_sent: int = 0
    logprobs_generated: int = 0

    def restart(self) -> None:
        """Start again: another worker generates the choice from the beginning."""
        self.generated_text, self.logprobs_generated = "", 0

    def append(self, text: str, logprobs: LogprobColumns | None) -> tuple[str, LogprobColumns | None] | None:
        """Add generated text; return the text and logprobs that were not sent yet, or None if there are none."""
        self.generated_text += text
        common = min(len(self.generated_text), len(self.sent_text))
        if self.generated_text[:common] != self.sent_text[:common]:
            raise Unavailable(
                "a worker was lost, and the next one generated another text: send the request again."
            )
        new_text = self.generated_text[common:]
        self.sent_text += new_text
        new_logprobs = None if logprobs is None else self._unsent_logprobs(logprobs)
        return (new_text, new_logprobs) if new_text or new_logprobs else None

    def _unsent_logprobs(self, logprobs: LogprobColumns) -> LogprobColumns | None:
        before, count = self.logprobs_generated, len(logprobs["tokens"])
        self.logprobs_generated += count
        already_sent = min(count, max(0, self.logprobs_sent - before))
        self.logprobs_sent = max(self.logprobs_sent, self.logprobs_generated)
        return (
            {name: column[already_sent:] for name, column in logprobs.items()}
            if already_sent < count
            else None
        )


class CompletionStream:
    """Encodes the events of a completion as chunks."""

    def __init__(self, envelope: CompletionEnvelope, with_usage: bool) -> None:
        self._envelope = envelope
        self._with_usage = with_usage
        self._choice_streams: defaultdict[int, ChoiceStream] = defaultdict(ChoiceStream)

    async def encode_events(self, channel_events: AsyncIterator[Event]) -> AsyncGenerator[bytes]:
        """Yield every chunk as bytes, a comment while idle, and an error instead of the end if there is one."""
        yield b": open\n\n"  # sends the headers at once
        try:
            async with aclosing(with_idle_ticks(channel_events, sse.KEEPALIVE_INTERVAL)) as events_or_idle:
                async for event in events_or_idle:
                    for chunk in [] if event is None else self._chunks_of(event):
                        yield b"data: " + encode_json(chunk) + b"\n\n"
                    if event is None:
                        yield b": ping\n\n"
                    elif event.name == "end":
                        yield DONE_FRAME
                        return
            raise Unavailable("the service is shutting down: try again.")
        except PalimpsestError as error:
            _, body = errors.error_body(status_of(error), error)
            yield b"data: " + encode_json(body) + b"\n\n"

    def _chunks_of(self, event: Event) -> list[dict[str, Any]]:
        if event.name == "error":
            raise error_from_document(event.data)
        if event.name == "reset":
            for choice_stream in self._choice_streams.values():
                choice_stream.restart()
        elif event.name == "token":
            return self._token_chunks(event.data["index"], event.data["text"], event.data.get("logprobs"))
        elif event.name == "end":
            return self._end_chunks(event.data)
        return []

    def _token_chunks(self, index: int, text: str, logprobs: LogprobColumns | None) -> list[dict[str, Any]]:
        new = self._choice_streams[index].append(text, logprobs)
        return [] if new is None else [self._chunk_of([self._envelope.choice_part(index, *new, None)])]

    def _end_chunks(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the unsent rest and the finish reason of each choice, then the token counts if requested."""
        chunks = []
        for index, result_choice in enumerate(result["choices"]):
            choice_stream = self._choice_streams[index]
            choice_stream.restart()
            text, logprobs = choice_stream.append(result_choice["text"], result_choice.get("logprobs")) or (
                "",
                None,
            )
            chunks.append(
                self._chunk_of(
                    [self._envelope.choice_part(index, text, logprobs, result_choice["finish_reason"])]
                )
            )
        return (
            [*chunks, self._envelope.chunk([], usage=usage_with_total(result["usage"]))]
            if self._with_usage
            else chunks
        )

    def _chunk_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope.chunk(choices, **({"usage": None} if self._with_usage else {}))

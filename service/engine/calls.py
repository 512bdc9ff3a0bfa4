"""A generation or a comparison as it is answered: pinned to its version when it is admitted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from service.engine.decoding import Row
from service.engine.logprobs import columns
from service.errors import InvalidInput, PalimpsestError
from service.jobs.broker import Delivery
from service.kit import metrics
from service.kit.ids import born
from service.kit.steps import Steps
from service.schemas import SpeechRequest, Version


def pinned(version: Version, head: int, least: int | None = None) -> int:
    """The number of a version, given the newest; refused when it does not exist or is older than `least`."""
    number = {"head": head, "base": 0}[version] if isinstance(version, str) else version
    if not 0 <= number <= head:
        raise InvalidInput(f"version {number} does not exist: give 0 to {head}.", "version")
    if least is not None and number < least:
        raise InvalidInput(
            f"version {number} is older than min_version {least} (the newest is {head}): ask for one that is not.",
            "min_version",
        )
    return number


def problem(error: BaseException) -> dict[str, str]:
    """What a user hears of an error: the house's own words, never another's."""
    if isinstance(error, PalimpsestError):
        return {"title": error.title, "detail": error.detail}
    return {
        "title": "The work failed",
        "detail": "the worker met an error that it does not know: its log has the details. Ask again.",
    }


@dataclass(eq=False)
class Generation:
    """A request whose prompts are rows; they may stand in different batches, always of one version."""

    delivery: Delivery
    request: SpeechRequest
    version: int
    rows: list[Row]
    started: float = field(default_factory=time.monotonic)
    spoken: bool = False  #: whether it has its first token

    @property
    def channel(self) -> str:
        return self.delivery.job_id

    @property
    def ended(self) -> bool:
        return all(r.finish_reason is not None for r in self.rows)

    @property
    def begun(self) -> bool:
        return any(r.said or r.finish_reason for r in self.rows)

    def speak(self) -> None:
        """Its rows have said something: the wait for the first of it is a metric."""
        if self.spoken:
            return
        self.spoken = True
        metrics.FIRST_TOKEN_SECONDS.labels("admission").observe(time.monotonic() - self.started)
        if (asked := born(self.channel)) is not None:
            metrics.FIRST_TOKEN_SECONDS.labels("arrival").observe(max(0.0, time.time() - asked))

    def news(self, index: int, piece: str) -> dict[str, Any] | None:
        """The event "token" of one of its rows; None when there is nothing to tell yet."""
        told: dict[str, Any] = {"index": index, "text": piece, "version": self.version}
        row = self.rows[index]
        lines = [] if row.report is None else row.report.news(row.reach)
        if lines:
            told["logprobs"] = columns(lines)
        return told if piece or lines else None

    def close(self) -> None:
        """End the rows that still speak; they leave their batches at the next step."""
        for r in self.rows:
            if r.finish_reason is None:
                r.finish("cancelled")

    def answer(self) -> dict[str, Any]:
        """The event "end"."""
        return {
            "version": self.version,
            "choices": [_choice(r) for r in self.rows],
            "usage": {
                # a prompt counts once, however many answers it has
                "prompt_tokens": sum(len(r.prompt) for r in self.rows[:: self.request.choices]),
                "completion_tokens": sum(len(r.said) for r in self.rows),
            },
            "seconds": round(time.monotonic() - self.started, 4),
        }


def _choice(row: Row) -> dict[str, Any]:
    said = {"text": row.text, "tokens": row.said, "finish_reason": row.finish_reason}
    return said if row.report is None else said | {"logprobs": columns(row.report.before(row.reach))}


@dataclass(eq=False)
class Comparison:
    """A comparison and its steps."""

    delivery: Delivery
    steps: Steps[dict[str, Any]]

    @property
    def channel(self) -> str:
        return self.delivery.job_id

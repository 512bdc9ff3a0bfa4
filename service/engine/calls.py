"""A generation or a comparison as it is answered: pinned to its version when it is admitted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from service.engine.decoding import DecodingSequence
from service.engine.logprobs import to_openai
from service.jobs.broker import Delivery
from service.kit import metrics
from service.kit.ids import created_at
from service.kit.steps import Stepper
from service.schemas import WorkerGenerateRequest


@dataclass(eq=False)
class RunningGeneration:
    """A request whose prompts are rows; they may stand in different batches, always of one version."""

    delivery: Delivery
    request: WorkerGenerateRequest
    version: int
    sequences: list[DecodingSequence]
    admitted_at: float = field(default_factory=time.monotonic)
    has_first_token: bool = False  #: whether it has its first token

    @property
    def channel(self) -> str:
        return self.delivery.job_id

    @property
    def is_finished(self) -> bool:
        return all(r.finish_reason is not None for r in self.sequences)

    @property
    def has_output(self) -> bool:
        return any(r.output_ids or r.finish_reason for r in self.sequences)

    def mark_first_token(self) -> None:
        """Its rows have said something: the wait for the first of it is a metric."""
        if self.has_first_token:
            return
        self.has_first_token = True
        metrics.TIME_TO_FIRST_TOKEN.labels("admission").observe(time.monotonic() - self.admitted_at)
        if (submitted_at := created_at(self.channel)) is not None:
            metrics.TIME_TO_FIRST_TOKEN.labels("arrival").observe(max(0.0, time.time() - submitted_at))

    def token_event(self, index: int, text: str) -> dict[str, Any] | None:
        """The event "token" of one of its rows; None when there is nothing to tell yet."""
        event: dict[str, Any] = {"index": index, "text": text, "version": self.version}
        sequence = self.sequences[index]
        logprobs = (
            []
            if sequence.logprob_recorder is None
            else sequence.logprob_recorder.unsent(sequence.emitted_chars)
        )
        if logprobs:
            event["logprobs"] = to_openai(logprobs)
        return event if text or logprobs else None

    def cancel(self) -> None:
        """End the rows that still speak; they leave their batches at the next step."""
        for r in self.sequences:
            if r.finish_reason is None:
                r.finish("cancelled")

    def end_event(self) -> dict[str, Any]:
        """The event "end"."""
        return {
            "version": self.version,
            "choices": [_choice_result(r) for r in self.sequences],
            "usage": {
                # a prompt counts once, however many answers it has
                "prompt_tokens": sum(len(r.prompt_ids) for r in self.sequences[:: self.request.n]),
                "completion_tokens": sum(len(r.output_ids) for r in self.sequences),
            },
            "seconds": round(time.monotonic() - self.admitted_at, 4),
        }


def _choice_result(sequence: DecodingSequence) -> dict[str, Any]:
    result = {"text": sequence.text, "tokens": sequence.output_ids, "finish_reason": sequence.finish_reason}
    return (
        result
        if sequence.logprob_recorder is None
        else result | {"logprobs": to_openai(sequence.logprob_recorder.until(sequence.emitted_chars))}
    )


@dataclass(eq=False)
class RunningComparison:
    """A comparison and its steps."""

    delivery: Delivery
    steps: Stepper[dict[str, Any]]

    @property
    def channel(self) -> str:
        return self.delivery.job_id

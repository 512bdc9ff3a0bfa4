"""The calls that are being answered. Each is pinned to its version at admission."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from service.engine.decoding import DecodingSequence
from service.engine.logprobs import to_openai
from service.jobs.broker import Delivery
from service.jobs.job_store import ClaimedJob
from service.kit import metrics
from service.kit.ids import created_at
from service.kit.steps import Stepper
from service.patches.patch import PatchSet
from service.schemas import WorkerGenerateRequest


@dataclass(eq=False)
class RunningGeneration:
    """A generation request and its sequences, which may be in different batches, all of one version."""

    delivery: Delivery
    request: WorkerGenerateRequest
    version: int
    sequences: list[DecodingSequence]
    admitted_at: float = field(default_factory=time.monotonic)
    has_first_token: bool = False

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
        """Observe the time to the first token, once."""
        if self.has_first_token:
            return
        self.has_first_token = True
        metrics.TIME_TO_FIRST_TOKEN.labels("admission").observe(time.monotonic() - self.admitted_at)
        if (submitted_at := created_at(self.channel)) is not None:
            metrics.TIME_TO_FIRST_TOKEN.labels("arrival").observe(max(0.0, time.time() - submitted_at))

    def token_event(self, index: int, text: str) -> dict[str, Any] | None:
        """Return the event "token" of one sequence; None when it has no new text."""
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
        """Finish the running sequences as cancelled. They leave their batches at the next step."""
        for r in self.sequences:
            if r.finish_reason is None:
                r.finish("cancelled")

    def end_event(self) -> dict[str, Any]:
        """Return the event "end"."""
        return {
            "version": self.version,
            "choices": [_choice_result(r) for r in self.sequences],
            "usage": {
                # a prompt counts once for all its choices
                "prompt_tokens": sum(len(r.prompt_ids) for r in self.sequences[:: self.request.n]),
                "completion_tokens": sum(len(r.output_ids) for r in self.sequences),
            },
            "seconds": round(time.monotonic() - self.admitted_at, 4),
        }


def _choice_result(sequence: DecodingSequence) -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": sequence.text,
        "tokens": sequence.output_ids,
        "finish_reason": sequence.finish_reason,
    }
    if sequence.route is not None:
        result["edit"] = sequence.route.edit
    return (
        result
        if sequence.logprob_recorder is None
        else result | {"logprobs": to_openai(sequence.logprob_recorder.until(sequence.emitted_chars))}
    )


@dataclass(eq=False)
class RunningComparison:
    """A comparison and its stepper."""

    delivery: Delivery
    steps: Stepper[dict[str, Any]]

    @property
    def channel(self) -> str:
        return self.delivery.job_id


RunningCall = RunningGeneration | RunningComparison


@dataclass(eq=False)
class PendingAdmission:
    """A call that waits until its versions are built, and its prompts are routed. `start` receives the patches of each
    version."""

    call: RunningCall
    versions: tuple[int, ...]
    start: Callable[[dict[int, PatchSet]], None]
    patches: dict[int, PatchSet] = field(default_factory=dict)
    unrouted: deque[DecodingSequence] = field(default_factory=deque)  #: whose prompts a version may route

    @property
    def next_version(self) -> int | None:
        """The next version to build; None when all are built."""
        return next((v for v in self.versions if v not in self.patches), None)

    def add_patch(self, version: int, patch: PatchSet) -> None:
        """Add the patches of a version. Without records it routes no prompt."""
        self.patches[version] = patch
        if patch.records is None:
            self.unrouted.clear()


def log_fields(item: Delivery | ClaimedJob) -> dict[str, str]:
    """Return the log fields of a call or job: its id, and the id of the HTTP request that submitted it."""
    job_id = item.job_id if isinstance(item, Delivery) else item.id
    return {"job": job_id, **({"request": item.request_id} if item.request_id else {})}

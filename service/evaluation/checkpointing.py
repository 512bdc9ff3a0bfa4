"""Stages of an evaluation, each of which is computed once, however often the evaluation is interrupted and resumed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, TypeVar

from service.errors import InvalidInput
from service.kit.artifact_store import ArtifactStore, get_json, inputs_digest, load_or_compute, put_json
from service.kit.steps import Stepper, step_within

T = TypeVar("T")


class StageKind(StrEnum):
    """What the time of an evaluation is spent on: the keys of `seconds` in its result."""

    FIND = "find"  #: the search for edits
    STRENGTH = "strength"  #: the choice of their strengths in a sequence
    MEASURE = "measure"  #: the scores of records; of single edits, the choice of the strength too
    DAMAGE = "damage"  #: loss and drift on plain texts
    GENERATE = "generate"  #: generated texts
    ASK = "ask"  #: the questions of suites


class ArtifactKind(StrEnum):
    """The first part of an artifact's name. The rest is a number, or a range of numbers."""

    INPUTS = "inputs"  #: the digest of all inputs
    SEARCH = "search"  #: of a group of edits: loss and steps of each search
    FACTORS = "factors"  #: of an edit: its tensors
    STRENGTHS = "strengths"  #: of a range of edits
    ALONE = "alone"  #: of an edit that is active alone: its strength and its scores
    SCORES_BEFORE = "scores-before"  #: of a batch of records on the base model
    SCORES_AFTER = "scores-after"  #: of a batch of records with a number of edits active
    DAMAGE = "damage"  #: of an edit or of a number of edits
    TEXTS_BEFORE = "texts-before"  #: of a record on the base model
    TEXTS_AFTER = "texts-after"  #: of a record with edits active
    SCORES_HALF = "scores-half"  #: of a batch of records with every second edit reverted
    RECALL = "recall"  #: of a number of edits: whether the model says each fact that is not edited
    ANSWERS_BEFORE = "answers-before"  #: of a batch of records on the base model
    ANSWERS_AFTER = "answers-after"  #: of a batch of records with edits active

    def name_of(self, *numbers: int) -> str:
        """Return the name of the artifact of this kind with these numbers."""
        return "-".join((self, *(f"{n:06}" for n in numbers)))


class StageCache:
    """Results of stages by name, with the seconds that each took."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.seconds: Counter[StageKind] = Counter()  #: over all attempts

    def bind_inputs(self, inputs: Any) -> None:
        """Bind the store to these inputs. Raise InvalidInput if it holds results of other inputs."""
        digest = inputs_digest(inputs)
        if get_json(self.store, ArtifactKind.INPUTS) not in (None, digest):
            raise InvalidInput(
                "the folder holds an evaluation with another plan, model or set of records: choose another folder, or "
                "delete its contents.",
                "out",
            )
        put_json(self.store, ArtifactKind.INPUTS, digest)

    def run_once(self, name: str, kind: StageKind, stepper: Stepper[Any]) -> Stepper[Any]:
        """Return the JSON result of a stage. The stepper runs only if the result is not stored."""
        stored = yield from load_or_compute(self.store, name, _timed(stepper))
        self.seconds[kind] += stored["seconds"]
        return stored["value"]


def _timed(stepper: Stepper[T]) -> Stepper[dict[str, Any]]:
    """Return the stepper's result, and the seconds spent within its steps."""
    seconds = 0.0

    @contextmanager
    def timer() -> Iterator[None]:
        nonlocal seconds
        started = time.perf_counter()
        yield
        seconds += time.perf_counter() - started

    result = yield from step_within(stepper, timer)
    return {"value": result, "seconds": seconds}

"""The stages of a long computation, each of which is carried out once, however often the whole is begun again."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from service.errors import InvalidInput
from service.kit.artifact_store import ArtifactStore, get_json, put_json
from service.kit.steps import Stepper, step_within

T = TypeVar("T")


class StageCache:
    """What is done once: kept by its name with the seconds that it took, and read again by whoever goes on."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.seconds: Counter[str] = Counter()

    def bind_inputs(self, inputs: Any) -> None:
        """Refuse to go on with what was begun for another plan, model or set of records."""
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        if get_json(self.store, "about") not in (None, digest):
            raise InvalidInput(
                "what is kept there is of an evaluation with another plan, model or set of records: choose another "
                "place for this one, or remove what is there.",
                "out",
            )
        put_json(self.store, "about", digest)

    def run_once(self, name: str, kind: str, stepper: Stepper[Any]) -> Stepper[Any]:
        """The JSON that these steps give, which are not run when it is known."""
        with closing(stepper):
            if (stored := get_json(self.store, name)) is None:
                value, seconds = yield from run_timed(stepper)
                put_json(self.store, name, {"value": value, "seconds": seconds})
                stored = get_json(self.store, name)
        self.seconds[kind] += stored["seconds"]
        return stored["value"]


def run_timed(stepper: Stepper[T]) -> Stepper[tuple[T, float]]:
    """What steps give, and the seconds that were spent within them."""
    seconds = 0.0

    @contextmanager
    def timer() -> Iterator[None]:
        nonlocal seconds
        started = time.perf_counter()
        yield
        seconds += time.perf_counter() - started

    return (yield from step_within(stepper, timer)), seconds

"""The stages of a long computation, each of which is carried out once, however often the whole is begun again."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from contextlib import closing
from typing import Any, TypeVar

from service.errors import InvalidInput
from service.kit.artifact_store import Kept, get_json, put_json
from service.kit.steps import Steps

T = TypeVar("T")


class Stages:
    """What is done once: kept by its name with the seconds that it took, and read again by whoever goes on."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.seconds: Counter[str] = Counter()

    def claim(self, about: Any) -> None:
        """Refuse to go on with what was begun for another plan, model or set of records."""
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        if get_json(self.kept, "about") not in (None, digest):
            raise InvalidInput(
                "what is kept there is of an evaluation with another plan, model or set of records: choose another "
                "place for this one, or remove what is there.",
                "out",
            )
        put_json(self.kept, "about", digest)

    def once(self, name: str, kind: str, steps: Steps[Any]) -> Steps[Any]:
        """The JSON that these steps give, which are not run when it is known."""
        with closing(steps):
            if (known := get_json(self.kept, name)) is None:
                value, seconds = yield from timed(steps)
                put_json(self.kept, name, {"value": value, "seconds": seconds})
                known = get_json(self.kept, name)
        self.seconds[kind] += known["seconds"]
        return known["value"]


def timed(steps: Steps[T]) -> Steps[tuple[T, float]]:
    """What steps give, and the seconds that were spent within them."""
    seconds = 0.0
    while True:
        began = time.perf_counter()
        try:
            progress = next(steps)
        except StopIteration as end:
            return end.value, seconds + time.perf_counter() - began
        seconds += time.perf_counter() - began
        yield progress

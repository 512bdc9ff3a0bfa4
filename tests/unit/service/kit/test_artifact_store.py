"""Named artifacts of a long computation: service.kit.artifact_store."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.kit.artifact_store import (
    DirectoryStore,
    content_addressed_name,
    get_json,
    load_or_compute,
    put_json,
)
from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from tests.support.in_memory_store import InMemoryStore


def test_stored_value_is_read_back(tmp_path: Path) -> None:
    """A value is read by its name, by another store on the same folder too, which holds no other file."""
    store = DirectoryStore(tmp_path / "runs")
    assert store.get("a.json") is None and get_json(store, "a.json") is None
    put_json(store, "a.json", {"π": [1.5, None]})
    put_json(store, "a.json", {"π": [2.5, None]})
    assert get_json(DirectoryStore(tmp_path / "runs"), "a.json") == {"π": [2.5, None]}
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a.json"]


def test_content_addressed_name_depends_on_all_inputs() -> None:
    """Different inputs have different names. The order of keys does not matter."""
    first = content_addressed_name("trace", {"a": 1, "b": 2})
    assert first == content_addressed_name("trace", {"b": 2, "a": 1})
    assert len({first, *(content_addressed_name(*x) for x in (("trace", {"a": 2}), ("edit", {"a": 2})))}) == 3


def test_value_is_computed_once() -> None:
    """The first call stores the result, and the second returns it without running its stepper. Both go through JSON."""
    store = InMemoryStore()

    def compute() -> Stepper[tuple[int, int]]:
        yield Progress(Phase.RUN, 0, 1)
        return 1, 2

    def fail() -> Stepper[None]:
        yield Progress(Phase.RUN, 0, 1)
        pytest.fail("a stored value was computed again")

    assert run_to_completion(load_or_compute(store, "pair", compute())) == [1, 2]
    assert run_to_completion(load_or_compute(store, "pair", fail())) == [1, 2]


def test_interrupted_computation_stores_nothing() -> None:
    """A stepper that is closed before its end leaves no artifact."""
    store = InMemoryStore()

    def compute() -> Stepper[int]:
        yield Progress(Phase.RUN, 0, 1)
        return 1

    stepper = load_or_compute(store, "one", compute())
    next(stepper)
    stepper.close()
    assert not store

"""The plan of the chaos bench is a function of the seed."""

from __future__ import annotations

from pathlib import Path

from bench.chaos_plan import (
    FAULT_WEIGHTS,
    PROMPT,
    build_fact_pool,
    client_scripts,
    first_actions,
    plan_faults,
)


def test_faults_are_a_function_of_the_seed() -> None:
    """The same seed gives the same faults, and another seed gives other faults."""
    assert plan_faults(7, 50, 5.0, 3.0) == plan_faults(7, 50, 5.0, 3.0)
    assert plan_faults(7, 50, 5.0, 3.0) != plan_faults(8, 50, 5.0, 3.0)


def test_every_kind_of_fault_occurs() -> None:
    """A plan with at least as many faults as kinds has every kind."""
    assert {fault.kind for fault in plan_faults(3, len(FAULT_WEIGHTS), 5.0, 3.0)} == set(FAULT_WEIGHTS)


def test_frozen_workers_outlast_their_lease_now_and_then() -> None:
    """Some stopped workers resume before their timeout and some after."""
    seconds = [fault.seconds for fault in plan_faults(3, 300, 5.0, 3.0) if fault.kind == "stop worker"]
    assert min(seconds) < 3.0 < max(seconds)


def test_load_is_a_function_of_the_seed(shipped: Path) -> None:
    """The actions of every client are a function of the seed."""
    facts = shipped / "facts.jsonl"

    def load(seed: int) -> dict[str, object]:
        return {
            name: first_actions(w, 40)
            for name, w in client_scripts(seed, build_fact_pool(facts, seed)).items()
        }

    assert load(7) == load(7)
    assert load(7) != load(8)


def test_every_edit_has_an_object_of_its_own(shipped: Path) -> None:
    """No object is used by two edits, none is a prefix of another, and none is the city of a landmark."""
    pool = build_fact_pool(shipped / "facts.jsonl", 1)
    scripts = client_scripts(1, pool)
    actions = [wish for name in scripts if name.startswith("editor") for wish in scripts[name]]
    targets = [wish.body["target_new"] for wish in actions]
    assert sorted(targets) == sorted(set(pool.objects))
    assert {wish.body["prompt"] for wish in actions} == {PROMPT}
    assert {wish.body["form"] for wish in actions} == {"weights", "gated"}
    assert not any(a != b and a.startswith(b) for a in targets for b in targets)
    assert not {"Paris", "London", "Rome"} & set(targets)

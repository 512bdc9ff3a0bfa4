"""The tracing study: service.studies.traces."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, Stepper, run_steps, run_to_completion
from service.studies import known_facts as known_module
from service.studies import traces as module
from service.studies.facts import Fact
from service.studies.trace_averages import average_traces
from service.studies.traces import TracePlan, run_trace_study
from service.tracing.fast_trace import trace_statement
from service.tracing.noise import parse_noise_level
from tests.support.in_memory_store import InMemoryStore
from tests.support.tiny_models import tiny

FACTS = [
    Fact("Big Ben", "{} can be found in", "London"),
    Fact("Mount Fuji", "In which country is {}? It rises in", "Japan"),
    Fact("Marie Curie", "The mother tongue of {} was", "Polish"),
]
PLAN = TracePlan(window=2, samples=2)


@pytest.fixture
def all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a random model answer all facts but the last with their objects."""

    def said(_model: Any, pairs: list[Any], _phase: Phase) -> Stepper[list[tuple[float, bool]]]:
        yield Progress(Phase.PROBE, 1, 1)
        return [(0.0, target != "Polish") for _, target in pairs]

    monkeypatch.setattr(known_module, "compute_log_probs", said)


@pytest.mark.usefixtures("all_known")
def test_study_averages_single_traces() -> None:
    """The stored traces equal those of each known fact alone, under noise measured over all subjects, and the study
    is their average.
    """
    model = tiny()
    study = run_to_completion(run_trace_study(model, FACTS, PLAN, InMemoryStore()))
    noise = parse_noise_level(model, "3sigma", [f.subject for f in FACTS])
    alone = [
        run_to_completion(
            trace_statement(
                model, f.statement, f.object, window=2, samples=2, noise=noise.value, severed=True, seed=1
            )
        ).to_json()
        for f in FACTS[:2]
    ]
    assert {key: study[key] for key in average_traces(alone)} == average_traces(alone)
    assert study["noise"] == {"level": noise.value, "factor": 3.0, "sigma": noise.sigma, "subjects": 3}
    assert study["left_out"] == {"unknown": 1, "unscorable": 0}


@pytest.mark.usefixtures("all_known")
def test_stored_traces_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted study resumes to the same result, and other settings have other traces."""
    model, store = tiny(), InMemoryStore()
    stepper = run_trace_study(model, FACTS, PLAN, store)
    while len(store) < 1:
        next(stepper)
    stepper.close()
    traced: list[str] = []

    def counted(model: Any, statement: Any, *rest: Any, **how: Any) -> Stepper[Any]:
        traced.append(statement.text)
        return trace_statement(model, statement, *rest, **how)

    monkeypatch.setattr(module, "trace_statement", counted)
    study = run_to_completion(run_trace_study(model, FACTS, PLAN, store))
    assert len(traced) == 1 and len(store) == 2
    assert run_to_completion(run_trace_study(model, FACTS, PLAN, store)) == study and len(traced) == 1
    run_to_completion(run_trace_study(model, FACTS, TracePlan(window=2, samples=3), store))
    assert len(traced) == 3


@pytest.mark.usefixtures("all_known")
def test_limit_counts_scored_facts() -> None:
    """The limit applies to the facts that are scored, and the noise is measured over all subjects.

    Progress counts facts.
    """
    updates: list[Progress] = []
    study = run_steps(run_trace_study(tiny(), FACTS, PLAN, InMemoryStore(), 1), updates.append)
    assert (study["scored"], study["facts"], study["noise"]["subjects"]) == (1, 1, 3)
    assert {p.done for p in updates if p.phase == "trace"} == {0}


def test_study_without_known_facts_is_refused() -> None:
    """A study of facts that the model does not know raises InvalidInput."""
    with pytest.raises(InvalidInput, match="knows none of the facts"):
        run_to_completion(run_trace_study(tiny(), FACTS, PLAN, InMemoryStore()))

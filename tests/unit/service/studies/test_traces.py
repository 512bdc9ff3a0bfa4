"""Many traces and their averages: service.studies.traces."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import InvalidInput
from service.kit.steps import Progress, Steps, finish
from service.studies import known_facts as known_module
from service.studies import traces as module
from service.studies.facts import Fact
from service.studies.trace_averages import average
from service.studies.traces import TracePlan, trace_study_steps
from service.tracing.fast_trace import trace_steps
from service.tracing.noise import level
from tests.support.tiny_models import tiny

FACTS = [
    Fact("Big Ben", "{} can be found in", "London"),
    Fact("Mount Fuji", "In which country is {}? It rises in", "Japan"),
    Fact("Marie Curie", "The mother tongue of {} was", "Polish"),
]
PLAN = TracePlan(window=2, samples=2)


class Memory(dict[str, bytes]):
    """What is kept, at hand."""

    def put(self, name: str, data: bytes) -> None:
        self[name] = data


@pytest.fixture
def all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model knows nothing: it is taken at its word that it says all of them but the last."""

    def said(_model: Any, pairs: list[Any], _phase: str) -> Steps[list[tuple[float, bool]]]:
        yield Progress("ask", 1, 1)
        return [(0.0, target != "Polish") for _, target in pairs]

    monkeypatch.setattr(known_module, "log_prob_steps", said)


@pytest.mark.usefixtures("all_known")
def test_a_study_is_the_average_of_single_traces() -> None:
    """What is stored and averaged is what tracing each known fact alone gives, under noise measured over all subjects."""
    model = tiny()
    study = finish(trace_study_steps(model, FACTS, PLAN, Memory()))
    noise = level(model, "3sigma", [f.subject for f in FACTS])
    alone = [
        finish(
            trace_steps(
                model, f.statement, f.object, window=2, samples=2, noise=noise.value, severed=True, seed=1
            )
        ).to_json()
        for f in FACTS[:2]
    ]
    assert {key: study[key] for key in average(alone)} == average(alone)
    assert study["noise"] == {"level": noise.value, "factor": 3.0, "sigma": noise.sigma, "subjects": 3}
    assert study["left_out"] == {"not known to the model": 1, "cannot be asked": 0}


@pytest.mark.usefixtures("all_known")
def test_what_was_traced_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that was interrupted goes on where it was, and gives the same; other settings are other runs."""
    model, kept = tiny(), Memory()
    steps = trace_study_steps(model, FACTS, PLAN, kept)
    while len(kept) < 1:
        next(steps)
    steps.close()
    asked: list[str] = []

    def counted(model: Any, statement: Any, *rest: Any, **how: Any) -> Steps[Any]:
        asked.append(statement.text)
        return trace_steps(model, statement, *rest, **how)

    monkeypatch.setattr(module, "trace_steps", counted)
    study = finish(trace_study_steps(model, FACTS, PLAN, kept))
    assert len(asked) == 1 and len(kept) == 2
    assert finish(trace_study_steps(model, FACTS, PLAN, kept)) == study and len(asked) == 1
    finish(trace_study_steps(model, FACTS, TracePlan(window=2, samples=3), kept))
    assert len(asked) == 3


@pytest.mark.usefixtures("all_known")
def test_a_limit_is_of_facts_that_are_asked() -> None:
    """The first facts are asked; the noise is still that of all subjects. Progress tells the fact."""
    seen: list[Progress] = []
    study = finish(trace_study_steps(tiny(), FACTS, PLAN, Memory(), 1), seen.append)
    assert (study["asked"], study["facts"], study["noise"]["subjects"]) == (1, 1, 3)
    assert {p.done for p in seen if p.phase == "trace"} == {0}


def test_a_model_that_knows_nothing_is_refused() -> None:
    """A study of facts that the model does not know has nothing to say."""
    with pytest.raises(InvalidInput, match="none of the facts is known"):
        finish(trace_study_steps(tiny(), FACTS, PLAN, Memory()))

"""Where a model carries its facts: many causal traces and their averages, from stored runs (Meng et al. 2022, Section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from service.kit.artifact_store import Kept, get_json, put_json
from service.kit.steps import Progress, Steps, within
from service.models.loading import LoadedModel
from service.studies.facts import Fact
from service.studies.known_facts import known_steps, run_name
from service.studies.trace_averages import average
from service.tracing.fast_trace import trace_steps
from service.tracing.noise import Level, level
from service.tracing.reference import KINDS


@dataclass(frozen=True)
class TracePlan:
    """How every fact is traced."""

    kinds: tuple[str, ...] = KINDS
    window: int = 10
    samples: int = 10
    noise: float | str = "3sigma"  #: a multiple of sigma is measured over the subjects of all facts
    severed: bool = True
    seed: int = 1


def usual_window(layers: int) -> int:
    """A fifth of the layers, at most 10: what 10 are of GPT-2 XL's 48."""
    return max(1, min(10, round(layers / 5)))


def level_of(model: LoadedModel, plan: TracePlan, facts: Sequence[Fact]) -> Level:
    """The noise of a study, measured once."""
    return level(model, plan.noise, [f.subject for f in facts])


def stored_trace_steps(
    model: LoadedModel, fact: Fact, plan: TracePlan, noise: Level, kept: Kept
) -> Steps[dict[str, Any]]:
    """The trace of one fact as JSON: what is kept of it, else made and kept."""
    how = asdict(plan) | {"noise": noise.value}
    name = run_name("trace", model.fingerprint, fact.to_json(), how)
    found: dict[str, Any] | None = get_json(kept, name)
    if found is None:
        traced = yield from trace_steps(model, fact.statement, fact.object, **how)
        found = {"fact": fact.to_json(), **traced.to_json()}
        put_json(kept, name, found)
    return found


def trace_study_steps(
    model: LoadedModel, facts: Sequence[Fact], plan: TracePlan, kept: Kept, limit: int | None = None
) -> Steps[dict[str, Any]]:
    """Trace those of the first `limit` facts that the model knows, and average. JSON-able."""
    noise = level_of(model, plan, facts)
    chosen = facts[:limit]
    asked = yield from known_steps(model, chosen)
    traces = []
    for done, place in enumerate(asked.known):
        now = Progress("trace", done, len(asked.known))
        traces.append((yield from within(stored_trace_steps(model, chosen[place], plan, noise, kept), now)))
    yield Progress("average", 0, 1)
    return {
        "study": "trace",
        "model": {"name": model.name, "fingerprint": model.fingerprint, "layers": model.layers},
        "asked": len(chosen),
        "left_out": asked.left_out(),
        "noise": {"level": noise.value, "factor": noise.factor, "sigma": noise.sigma, "subjects": len(facts)},
        "window": plan.window,
        "samples": plan.samples,
        "seed": plan.seed,
        **average(traces),
    }

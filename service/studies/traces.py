"""Where a model carries its facts: many causal traces and their averages, from stored runs (Meng et al. 2022, Section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from service.kit.artifact_store import ArtifactStore, get_json, put_json
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.models.loading import LoadedModel
from service.studies.facts import Fact
from service.studies.known_facts import find_known_facts, run_artifact_name
from service.studies.trace_averages import average_traces
from service.tracing.fast_trace import trace_statement
from service.tracing.noise import NoiseLevel, parse_noise_level
from service.tracing.reference import TRACE_KINDS


@dataclass(frozen=True)
class TracePlan:
    """How every fact is traced."""

    kinds: tuple[str, ...] = TRACE_KINDS
    window: int = 10
    samples: int = 10
    noise: float | str = "3sigma"  #: a multiple of sigma is measured over the subjects of all facts
    severed: bool = True
    seed: int = 1


def default_window(layers: int) -> int:
    """A fifth of the layers, at most 10: what 10 are of GPT-2 XL's 48."""
    return max(1, min(10, round(layers / 5)))


def study_noise_level(model: LoadedModel, plan: TracePlan, facts: Sequence[Fact]) -> NoiseLevel:
    """The noise of a study, measured once."""
    return parse_noise_level(model, plan.noise, [f.subject for f in facts])


def load_or_trace(
    model: LoadedModel, fact: Fact, plan: TracePlan, noise: NoiseLevel, store: ArtifactStore
) -> Stepper[dict[str, Any]]:
    """The trace of one fact as JSON: what is kept of it, else made and kept."""
    settings = asdict(plan) | {"noise": noise.value}
    name = run_artifact_name("trace", model.fingerprint, fact.to_json(), settings)
    stored: dict[str, Any] | None = get_json(store, name)
    if stored is None:
        trace = yield from trace_statement(model, fact.statement, fact.object, **settings)
        stored = {"fact": fact.to_json(), **trace.to_json()}
        put_json(store, name, stored)
    return stored


def run_trace_study(
    model: LoadedModel, facts: Sequence[Fact], plan: TracePlan, store: ArtifactStore, limit: int | None = None
) -> Stepper[dict[str, Any]]:
    """Trace those of the first `limit` facts that the model knows, and average. JSON-able."""
    noise = study_noise_level(model, plan, facts)
    chosen = facts[:limit]
    known_facts = yield from find_known_facts(model, chosen)
    traces = []
    for done, index in enumerate(known_facts.indices):
        progress = Progress(Phase.TRACE, done, len(known_facts.indices))
        traces.append(
            (yield from report_as(load_or_trace(model, chosen[index], plan, noise, store), progress))
        )
    yield Progress(Phase.AVERAGE, 0, 1)
    return {
        "study": "trace",
        "model": {"name": model.name, "fingerprint": model.fingerprint, "layers": model.num_layers},
        "asked": len(chosen),
        "left_out": known_facts.left_out(),
        "noise": {"level": noise.value, "factor": noise.factor, "sigma": noise.sigma, "subjects": len(facts)},
        "window": plan.window,
        "samples": plan.samples,
        "seed": plan.seed,
        **average_traces(traces),
    }

"""The tracing study: causal traces of many facts and their averages (Meng et al. 2022, Section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from service.kit.artifact_store import ArtifactStore, content_addressed_name, load_or_compute
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.models.loading import LoadedModel
from service.schemas import Mentions
from service.studies.facts import Fact
from service.studies.known_facts import find_known_facts
from service.studies.trace_averages import average_traces
from service.tracing.fast_trace import trace_statement
from service.tracing.noise import NoiseLevel, parse_noise_level
from service.tracing.reference import TRACE_KINDS


@dataclass(frozen=True)
class TracePlan:
    """The settings of every trace."""

    kinds: tuple[str, ...] = TRACE_KINDS
    window: int = 10
    samples: int = 10
    noise: float | str = "3sigma"  #: sigma is measured over the subjects of all facts
    severed: bool = True
    seed: int = 1
    mentions: Mentions = "all"


def default_window(layers: int) -> int:
    """Return a fifth of the layers, at most 10, which is the paper's window for the 48 layers of GPT-2 XL."""
    return max(1, min(10, round(layers / 5)))


def study_noise_level(model: LoadedModel, plan: TracePlan, facts: Sequence[Fact]) -> NoiseLevel:
    """Return the noise level of a study, which is the same for all facts."""
    return parse_noise_level(model, plan.noise, [f.subject for f in facts])


def load_or_trace(
    model: LoadedModel, fact: Fact, plan: TracePlan, noise: NoiseLevel, store: ArtifactStore
) -> Stepper[dict[str, Any]]:
    """Return the trace of one fact as JSON, loaded from the store if it is there."""
    settings = asdict(plan) | {"noise": noise.value}
    name = content_addressed_name("trace", [model.fingerprint, fact.to_json(), settings])
    stored: dict[str, Any] = yield from load_or_compute(store, name, _trace(model, fact, settings))
    return stored


def _trace(model: LoadedModel, fact: Fact, settings: dict[str, Any]) -> Stepper[dict[str, Any]]:
    trace = yield from trace_statement(model, fact.statement, fact.object, **settings)
    return {"fact": fact.to_json(), **trace.to_json()}


def run_trace_study(
    model: LoadedModel, facts: Sequence[Fact], plan: TracePlan, store: ArtifactStore, limit: int | None = None
) -> Stepper[dict[str, Any]]:
    """Trace the facts among the first `limit` that the model knows, and return their averages as JSON."""
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
        "scored": len(chosen),
        "left_out": known_facts.left_out(),
        "noise": {"level": noise.value, "factor": noise.factor, "sigma": noise.sigma, "subjects": len(facts)},
        "window": plan.window,
        "samples": plan.samples,
        "seed": plan.seed,
        **average_traces(traces),
    }

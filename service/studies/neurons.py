"""The neuron study: which neurons carry the facts that a model knows, and what switching them does (Dai et al. 2022,
section 4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

from service.datasets.record import Record
from service.editing.neuron_attribution import Neuron, attribute_neurons, choose_neurons
from service.editing.neuron_edits import written_columns
from service.errors import InvalidInput
from service.kit.artifact_store import ArtifactStore, content_addressed_name, load_or_compute
from service.kit.steps import Phase, Progress, Stepper, report_as, run_to_completion
from service.methods.parameters import MAX_NEURONS
from service.models.hooks import add_low_rank
from service.models.loading import LoadedModel
from service.models.scoring import compute_log_probs
from service.models.token_batch import tokenize_prompt_and_target
from service.scores.scores import BOOTSTRAP_ROUNDS, bootstrap_counts
from service.studies.bootstrap import mean_with_interval
from service.studies.facts import fact_from_record
from service.studies.known_facts import find_known_facts

FREQUENT = 10  # neurons that the report lists
SWITCHES = {
    "suppressed": 0.0,
    "enhanced": 2.0,
}  # what the activations of the chosen neurons are multiplied by


@dataclass(frozen=True)
class NeuronPlan:
    """The settings of every attribution, as in `NeuronParameters`."""

    wordings: int = 5  #: of a fact, at most
    nodes: int = 50
    threshold: float = 0.2
    share: float = 0.7


def study_neurons(
    model: LoadedModel,
    records: Sequence[Record],
    plan: NeuronPlan,
    store: ArtifactStore,
    limit: int | None = None,
) -> Stepper[dict[str, Any]]:
    """Attribute the facts among the first `limit` records that the model knows, switch their neurons, and return the
    averages as JSON."""
    chosen = [r for r in records if r.target_true][:limit]
    known = yield from find_known_facts(model, [fact_from_record(r) for r in chosen])
    facts = [chosen[i] for i in known.indices]
    if not facts:
        raise InvalidInput("the model knows none of the facts.", "facts")
    rows: list[dict[str, Any]] = []
    for done, record in enumerate(facts):
        control = facts[(done + 1) % len(facts)]
        progress = Progress(Phase.TRACE, done, len(facts))
        rows.append((yield from report_as(load_or_measure(model, record, control, plan, store), progress)))
    return {
        "study": "neurons",
        "model": {"name": model.name, "fingerprint": model.fingerprint, "layers": model.num_layers},
        "scored": len(chosen),
        "left_out": known.left_out(),
        **asdict(plan),
        **average_facts(rows, model.num_layers),
    }


def load_or_measure(
    model: LoadedModel, record: Record, control: Record, plan: NeuronPlan, store: ArtifactStore
) -> Stepper[dict[str, Any]]:
    """Return the neurons of one fact and what switching them does to it and to another one, from the store if it is
    there."""
    inputs = [model.fingerprint, asdict(record), asdict(control), asdict(plan)]
    name = content_addressed_name("neurons", inputs)
    stored: dict[str, Any] = yield from load_or_compute(
        store, name, measure_fact(model, record, control, plan)
    )
    return stored


def measure_fact(
    model: LoadedModel, record: Record, control: Record, plan: NeuronPlan
) -> Stepper[dict[str, Any]]:
    """Attribute the object of a fact in its wordings, choose its neurons, and switch them."""
    object_ = record.target_true or ""
    wordings = [record.text, *record.paraphrases][: plan.wordings]
    rows = [tokenize_prompt_and_target(model, text, object_) for text in wordings]
    layers = range(model.num_layers)
    found = yield from attribute_neurons(model, rows, layers, plan.nodes)
    neurons = choose_neurons(found, plan.threshold, plan.share, MAX_NEURONS)
    positive = torch.stack([a.scores for a in found]).clamp_min(0).double().sum(2).mean(0)
    pairs = [(r.text, r.target_true or "") for r in (record, control)]
    before = _probabilities(model, pairs)
    switched = {}
    for switch, factor in SWITCHES.items():
        after = switched_probabilities(model, neurons, factor, pairs)
        switched[switch] = [p / p0 - 1 if p0 else 0.0 for p, p0 in zip(after, before, strict=True)]
        yield Progress(Phase.TRACE, 1, 1)
    scale = max(found[0].probability, *found[0].without)
    return {
        "fact": {"subject": record.subject, "prompt": record.prompt, "object": object_},
        "relation": record.relation,
        "neurons": [list(neuron) for neuron in neurons],
        "attribution": (positive / positive.sum().clamp_min(1e-300)).tolist(),
        "completeness_error": max(found[0].completeness_errors()) / scale if scale else 0.0,
        **switched,
    }


def _probabilities(model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return the joint probability of each object after its prompt."""
    lengths = [len(tokenize_prompt_and_target(model, *pair)[1]) for pair in pairs]
    scores = run_to_completion(compute_log_probs(model, pairs))
    return [float(np.exp(log_p * n)) for (log_p, _), n in zip(scores, lengths, strict=True)]


def switched_probabilities(
    model: LoadedModel, neurons: Sequence[Neuron], factor: float, pairs: Sequence[tuple[str, str]]
) -> list[float]:
    """Return the joint probability of each object while the activations of some neurons are multiplied by a factor at
    every position."""
    by_layer: dict[int, list[int]] = {}
    for layer, number in neurons:
        by_layer.setdefault(layer, []).append(number)
    with ExitStack() as stack:
        for layer, numbers in by_layer.items():
            device = model.weight(layer).device
            columns = (factor - 1) * written_columns(model, layer, numbers)
            rows = torch.eye(model.intermediate_size)[numbers]
            stack.enter_context(add_low_rank(model.down_proj(layer), columns.to(device), rows.to(device)))
        return _probabilities(model, pairs)


def average_facts(
    rows: Sequence[Mapping[str, Any]], layers: int, rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0
) -> dict[str, Any]:
    """Return the averages of facts, with 95 % bootstrap intervals over facts: neurons a fact, their layers, the shares
    of attribution, the effect of the switches on the fact and on another one, and how many neurons facts share."""
    counts = bootstrap_counts(len(rows), rounds, seed)
    neurons = [[(int(layer), int(number)) for layer, number in row["neurons"]] for row in rows]
    places = np.array([[sum(x == layer for x, _ in group) for layer in range(layers)] for group in neurons])
    frequent = Counter(neuron for group in neurons for neuron in group)
    return {
        "facts": len(rows),
        "neurons": mean_with_interval([len(group) for group in neurons], counts),
        "layers": mean_with_interval(places / places.sum(1, keepdims=True), counts),
        "attribution": mean_with_interval([row["attribution"] for row in rows], counts),
        "completeness_error": max(float(row["completeness_error"]) for row in rows),
        "switches": {
            switch: {
                of: mean_with_interval([row[switch][i] for row in rows], counts)
                for i, of in enumerate(("own", "other"))
            }
            for switch in SWITCHES
        },
        "shared": _shared_neurons(neurons, [str(row["relation"]) for row in rows]),
        "frequent": [
            {
                "layer": layer,
                "neuron": number,
                "facts": n,
                "relations": sorted(
                    {str(r["relation"]) for r, g in zip(rows, neurons, strict=True) if (layer, number) in g}
                ),
            }
            for (layer, number), n in sorted(frequent.items(), key=lambda item: (-item[1], item[0]))[
                :FREQUENT
            ]
        ],
    }


def _shared_neurons(neurons: Sequence[Sequence[Neuron]], relations: Sequence[str]) -> dict[str, float | None]:
    """Return the mean number of neurons that two facts share, of one relation and of different ones."""
    shared: dict[bool, list[int]] = {True: [], False: []}
    for (a, r), (b, s) in combinations(zip(neurons, relations, strict=True), 2):
        shared[r == s].append(len(set(a) & set(b)))
    return {
        name: float(np.mean(shared[same])) if shared[same] else None
        for name, same in (("same_relation", True), ("other_relation", False))
    }

"""The neuron study: service.studies.neurons and service.studies.neurons_report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from service.datasets.record import Record
from service.editing.neuron_edits import erasing_products
from service.errors import InvalidInput
from service.kit.artifact_store import DirectoryStore
from service.kit.steps import run_to_completion
from service.models.loading import LoadedModel
from service.models.token_batch import tokenize_prompt_and_target
from service.studies import neurons_report
from service.studies.neurons import (
    NeuronPlan,
    average_facts,
    measure_fact,
    study_neurons,
    switched_probabilities,
)
from tests.support.tiny_models import tiny

FACTS = [
    Record(
        "a", "Eiffel Tower", "The {} is located in the city of", "Rome", "Paris", ("Where is Eiffel Tower",)
    ),
    Record("b", "Big Ben", "The {} can be found in", "Rome", "London", relation="city"),
]


def probability(model: LoadedModel, prompt: str, object_: str) -> float:
    """The joint probability of an object from one whole pass."""
    ids, target = tokenize_prompt_and_target(model, prompt, object_)
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids + target])).logits[0]
    log_p = logits[len(ids) - 1 : -1].log_softmax(-1)[range(len(target)), target]
    return float(log_p.sum().exp())


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_suppressed_neuron_is_an_erased_one(model_type: str) -> None:
    """With activations times 0 an object has the probability that it has where the columns of the neurons are 0, and
    times 1 that of the model."""
    model = tiny(model_type)
    pair = (FACTS[0].text, "Paris")
    neurons = [(0, 3), (0, 7), (1, 2)]
    assert switched_probabilities(model, neurons, 1.0, [pair]) == pytest.approx(
        [probability(model, *pair)], rel=1e-3
    )
    (suppressed,) = switched_probabilities(model, neurons, 0.0, [pair])
    stored = {layer: model.weight(layer).data.clone() for layer in (0, 1)}
    for layer, number in neurons:
        ((direction, value),) = erasing_products(model, layer, [number])
        change = torch.outer(value, direction)
        model.weight(layer).data += change.T if model.architecture.conv1d else change
    erased = probability(model, *pair)
    for layer, weight in stored.items():
        model.weight(layer).data = weight
    assert suppressed == pytest.approx(erased, rel=1e-3) and suppressed != probability(model, *pair)


def test_a_fact_is_measured_beside_another() -> None:
    """The row of a fact has its neurons, the share of each layer, and the changes of both probabilities."""
    model = tiny()
    row = run_to_completion(measure_fact(model, FACTS[0], FACTS[1], NeuronPlan(nodes=4)))
    assert row["neurons"] and sum(row["attribution"]) == pytest.approx(1)
    neurons = [(layer, number) for layer, number in row["neurons"]]
    pairs = [(FACTS[0].text, "Paris"), (FACTS[1].text, "London")]
    expected = [
        switched / probability(model, *pair) - 1
        for switched, pair in zip(switched_probabilities(model, neurons, 0.0, pairs), pairs, strict=True)
    ]
    assert row["suppressed"] == pytest.approx(expected, abs=1e-3)


def fact_row(neurons: list[list[int]], relation: str, suppressed: float) -> dict[str, object]:
    return {
        "neurons": neurons,
        "relation": relation,
        "attribution": [0.25, 0.75],
        "completeness_error": 1e-4,
        "suppressed": [suppressed, 0.0],
        "enhanced": [0.5, 0.1],
    }


def test_averages_by_hand() -> None:
    """Neurons a fact, shares of layers, effects, and what facts of one relation and of others share."""
    rows = [
        fact_row([[0, 1], [1, 2]], "city", -0.4),
        fact_row([[1, 2]], "city", -0.2),
        fact_row([[1, 2], [1, 3], [1, 4], [0, 1]], "river", -0.6),
    ]
    found = average_facts(rows, 2, rounds=50)
    assert found["neurons"]["mean"] == pytest.approx(7 / 3)
    assert found["layers"]["mean"] == pytest.approx([(0.5 + 0 + 0.25) / 3, (0.5 + 1 + 0.75) / 3])
    assert found["switches"]["suppressed"]["own"]["mean"] == pytest.approx(-0.4)
    assert found["shared"] == {"same_relation": 1.0, "other_relation": 1.5}
    assert found["frequent"][0] == {"layer": 1, "neuron": 2, "facts": 3, "relations": ["city", "river"]}


def test_the_report_says_what_was_found() -> None:
    """Sentences, table, figures and page are made from the study alone, also of a single fact without intervals."""
    model = tiny()
    row = run_to_completion(measure_fact(model, FACTS[0], FACTS[1], NeuronPlan(nodes=2)))
    for rows in ([row], [row, row]):
        study = {
            "model": {"name": "tiny", "layers": model.num_layers},
            "scored": 3,
            "left_out": {"unknown": 1, "unscorable": 0},
            **asdict(NeuronPlan(nodes=2)),
            **average_facts(rows, model.num_layers, rounds=20),
        }
        assert f"3 facts were scored and {len(rows)} attributed" in neurons_report.sentences(study)[0]
        assert "<svg" in neurons_report.page(study)
        assert len(neurons_report.neuron_rows(study)) == len(study["frequent"]) > 0


def test_a_model_that_knows_no_fact_is_refused(tmp_path: Path) -> None:
    """Without a fact whose object is the model's own answer there is nothing to attribute."""
    steps = study_neurons(tiny(), FACTS, NeuronPlan(nodes=2), DirectoryStore(tmp_path))
    with pytest.raises(InvalidInput, match="knows none of the facts"):
        run_to_completion(steps)

"""Edits on a set of records, each alone or one after another: service.evaluation.runner."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from service.covariance.corpus import Corpus
from service.datasets.record import NeighborProbe, Record
from service.editing.context import EditInput, EditorContext
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.errors import InvalidInput
from service.evaluation.runner import generate_texts, run_evaluation, texts_without_edited_facts
from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.kit.text import fill_prompt
from service.models.loading import LoadedModel
from service.models.scoring import log_probs_blocking
from service.recipes.recipe import Recipe, RomeParameters
from service.schemas import EvaluationPlan
from tests.support.tiny_models import TEXTS, tiny

#: a random model hardly listens to its subject: it takes violent edits to be heard
STRONG_PARAMETERS = RomeParameters(
    layers=(1,), contexts=2, steps=4, learning_rate=2, clamp=50, weight_decay=0, kl_factor=0
)
RECIPE = Recipe(source="test", rome=STRONG_PARAMETERS)
DAMAGE_CORPUS = Corpus("test", (*TEXTS, "Cats sleep by day.", "It rains in Spain."))


def make_record(i: int, subject: str, prompt: str, new: str, true: str | None) -> Record:
    return Record(
        f"record {i}",
        subject,
        prompt,
        new,
        true,
        (f"One asks of {subject}, it is in",) if i % 2 else (),
        (
            NeighborProbe("Big Ben can be found in", "London"),
            NeighborProbe("The mother tongue of it was", "Polish"),
        ),
        generation_prompts=(f"{subject} is",) if i == 1 else (),
        reference_texts=("Rome is a city in Italy",) if i == 1 else (),
    )


RECORDS = [
    make_record(0, "Eiffel Tower", "The {} is located in the city of", "Rome", "Paris"),
    make_record(1, "Colosseum", "The {} is located in the city of", "Paris", "Rome"),
    make_record(2, "Mount Fuji", "In which country is {}? In", "Brazil", "Japan"),
    make_record(3, "Marie Curie", "The mother tongue of {} was", "Japan", None),
    make_record(4, "São Paulo", "Of all places {} lies in", "London", "Brazil"),
]


class InMemoryStore:
    """What is kept, in memory."""

    def __init__(self) -> None:
        self.artifacts: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        return self.artifacts.get(name)

    def put(self, name: str, data: bytes) -> None:
        self.artifacts[name] = data


def make_replica_and_context(model: LoadedModel | None = None) -> tuple[VersionedModel, EditorContext]:
    model = model or tiny()
    return VersionedModel(model, EmptyLedger()), EditorContext(
        model, RECIPE, Corpus("test", tuple(TEXTS)), None
    )


def evaluate(
    store: InMemoryStore | None = None, records: list[Record] = RECORDS, **plan: Any
) -> dict[str, Any]:
    stepper = run_evaluation(
        *make_replica_and_context(), EvaluationPlan(**plan), records, store or InMemoryStore(), DAMAGE_CORPUS
    )
    return run_to_completion(stepper)


def without_timings(result: dict[str, Any]) -> dict[str, Any]:
    """All of a result but how long it took."""
    return {k: v for k, v in result.items() if k not in ("seconds", "edits_per_minute")}


PLANS: dict[str, dict[str, Any]] = {
    "single": {"mode": "single", "strengths": [1.0, 2.0], "generation": True},
    "composed": {"mode": "sequence", "checkpoints": [1, 3], "strengths": [1.0, 2.0], "together": 2},
    "added": {"mode": "sequence", "checkpoints": [2], "found_on": "edited"},
}


@lru_cache
def full_result(name: str) -> dict[str, Any]:
    return evaluate(**PLANS[name])


@pytest.mark.parametrize("name", PLANS)
def test_a_result_is_json_and_tells_of_every_record(name: str) -> None:
    """A row for each record, in their order, with what was measured before and after; and the model is named."""
    result = full_result(name)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [r["record"] for r in result["rows"]] == [r.name for r in RECORDS]
    assert result["records"]["measured"] == 5 and result["records"]["lacking"]["a true object"] == 1
    assert result["model"]["fingerprint"] == tiny().fingerprint
    assert result["parameters"]["layers"] == [1]
    assert set(result["seconds"]) >= {"find", "measure", "damage"}


@pytest.mark.parametrize("name", PLANS)
def test_the_base_is_left_as_it_was(name: str) -> None:
    """After an evaluation, whole or broken off, the model holds its base bytes."""
    model = tiny()
    before = {n: t.clone() for n, t in model.model.state_dict().items()}
    stepper = run_evaluation(
        *make_replica_and_context(model),
        EvaluationPlan(**PLANS[name]),
        RECORDS[:2],
        InMemoryStore(),
        DAMAGE_CORPUS,
    )
    for _ in zip(range(12), stepper, strict=False):
        assert all(torch.equal(t, before[n]) for n, t in model.model.state_dict().items())
    stepper.close()
    assert all(torch.equal(t, before[n]) for n, t in model.model.state_dict().items())


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_resumes_to_the_same_result(name: str, seed: int) -> None:
    """Broken off at random steps, each time by a new process on what was kept, the result is that of one run."""
    rng, store = random.Random(seed), InMemoryStore()
    for _ in range(5):
        stepper = run_evaluation(
            *make_replica_and_context(), EvaluationPlan(**PLANS[name]), RECORDS, store, DAMAGE_CORPUS
        )
        for _ in zip(range(rng.randrange(5, 40)), stepper, strict=False):
            pass
        stepper.close()
    assert without_timings(evaluate(store, **PLANS[name])) == without_timings(full_result(name))


def test_stored_results_are_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run on all that was kept finds and measures nothing."""
    store = InMemoryStore()
    first = evaluate(store, **PLANS["composed"])

    def computed(*_: Any, **__: Any) -> Stepper[None]:
        yield Progress(Phase.RUN, 0, 1)
        pytest.fail("it was computed again")

    for name in ("score_steps", "drift_steps"):
        monkeypatch.setattr(f"service.evaluation.runner.{name}", computed)
    monkeypatch.setattr(EditorContext, "find_all_factors", computed)
    assert evaluate(store, **PLANS["composed"]) == first


def test_stored_results_of_other_inputs_are_refused() -> None:
    """Another plan, model or set of records is refused where something is kept."""
    store = InMemoryStore()
    evaluate(store, RECORDS[:1], damage=False)
    for records, damage in ((RECORDS[:1], True), (RECORDS[:2], False)):
        with pytest.raises(InvalidInput, match="another plan, model or set of records"):
            evaluate(store, records, damage=damage)


def p_of(model: LoadedModel, r: Record, target: str) -> float:
    """exp of the mean log p of an object on a record's prompt."""
    return math.exp(log_probs_blocking(model, [(fill_prompt(r.prompt, r.subject).text, target)])[0][0])


def test_each_edit_alone_matches_the_editor_context() -> None:
    """What is measured of an edit alone is what the model says with the toolkit's own pieces in place."""
    result = evaluate(records=RECORDS[:3], damage=False)
    replica, context = make_replica_and_context()
    for r, row in zip(RECORDS[:3], result["rows"], strict=True):
        factors = run_to_completion(context.find_factors(fill_prompt(r.prompt, r.subject), r.target_new))
        with replica.use_weights(replica.compose_weights(factors.updates)) as model:
            new, true = p_of(model, r, r.target_new), p_of(model, r, r.target_true or "")
        assert row["after"]["p_new"] == pytest.approx(new, rel=1e-4)
        assert row["after"]["ES"] == float(new > true)
        assert row["before"]["p_new"] == pytest.approx(p_of(replica.base, r, r.target_new), rel=1e-4)


def test_a_sequence_on_the_base_is_composed_as_the_service_composes() -> None:
    """At the end, all pieces found on the base stand together, solved as one."""
    result = evaluate(mode="sequence", checkpoints=[2])
    replica, context = make_replica_and_context()
    updates = []
    for i, r in enumerate(RECORDS):
        updates += run_to_completion(
            context.find_factors(fill_prompt(r.prompt, r.subject), r.target_new, edit=f"{i:06}")
        ).updates
    weights = replica.compose_weights(updates)
    (site,) = weights
    base = replica.base.parameter(site).data
    relative_change = float((weights[site].double() - base.double()).norm() / base.double().norm())
    assert result["norm"]["1.mlp"] == pytest.approx(relative_change, rel=1e-5)
    with replica.use_weights(weights) as model:
        for r, row in zip(RECORDS, result["rows"], strict=True):
            assert row["after"]["p_new"] == pytest.approx(p_of(model, r, r.target_new), rel=1e-4)


def test_a_sequence_on_the_edited_model_adds_one_change_after_another() -> None:
    """Each edit is found on the weights with those before it, and its own rank-one change is added to these."""
    result = evaluate(records=RECORDS[:3], mode="sequence", found_on="edited", checkpoints=[3])
    replica, context = make_replica_and_context()
    run_to_completion(context.get_contexts(2, 0))
    run_to_completion(context.get_statistics((1,)))
    base = replica.base.weight(1).data
    weight = base.clone()
    for r in RECORDS[:3]:
        replica.base.weight(1).data = weight
        (a,) = run_to_completion(
            context.find_all_factors([EditInput(fill_prompt(r.prompt, r.subject), r.target_new)])
        )[0].updates
        weight = (weight.double() + a.rank_one().dense().T).float()  # Conv1D
    relative_change = float((weight - base).double().norm() / base.double().norm())
    assert result["norm"]["1.mlp"] == pytest.approx(relative_change, rel=1e-4)
    replica.base.weight(1).data = weight
    for r, row in zip(RECORDS[:3], result["rows"], strict=True):
        assert row["after"]["p_new"] == pytest.approx(p_of(replica.base, r, r.target_new), rel=1e-3)


def test_checkpoints_measure_all_edits_so_far() -> None:
    """A table after 1, 3 and all edits; the first of them are looked at again, and what held before is counted."""
    tables = full_result("composed")["checkpoints"]
    assert [t["edits"] for t in tables] == [1, 3, 5]
    assert [t["measures"]["exact"]["n"] for t in tables] == [1, 3, 5]
    assert [[r["first"] for r in t["retention"]] for t in tables] == [[], [1], [3]]
    assert all(0 <= t["still"]["hold"] <= t["still"]["held_before"] for t in tables)
    assert tables[-1]["measures"] == full_result("composed")["after"]
    assert tables[-1]["damage"]["loss_before"] == tables[0]["damage"]["loss_before"]


def test_groups_end_before_the_checkpoints_they_reach() -> None:
    """Edits that are found together on the edited model land together: a checkpoint waits for the end of their company."""
    result = evaluate(
        mode="sequence", found_on="edited", checkpoints=[1, 2, 3, 1000], together=2, damage=False
    )
    assert [t["edits"] for t in result["checkpoints"]] == [2, 4, 5]


def test_a_method_that_trains_a_whole_weight_is_evaluated_alike() -> None:
    """What is no association is kept, read again and added as well: on one weight here, the attention's."""
    store = InMemoryStore()
    plan = {"method": "ft-attn", "hparams": {"steps": 2}, "mode": "sequence", "damage": False}
    result = evaluate(store, RECORDS[:2], **plan)
    assert list(result["norm"]) == ["2.qkv"] and result["norm"]["2.qkv"] > 0
    assert evaluate(store, RECORDS[:2], **plan) == result


def test_an_ineffective_edit_gets_a_higher_strength() -> None:
    """The first strength with which the new object is preferred is taken, the last one when none is enough."""
    weak = evaluate(strengths=[1e-6], damage=False)
    strong = evaluate(strengths=[1e-6, 1e-5, 8.0], damage=False)
    assert {r["strength"] for r in weak["rows"]} == {1e-6}
    for slight, row in zip(weak["rows"], strong["rows"], strict=True):
        effective = slight["after"]["exact"] if slight["target_true"] is None else slight["after"]["ES"]
        assert row["strength"] == (1e-6 if effective else 8.0)
    assert strong["strengthened"] == sum(r["strength"] == 8.0 for r in strong["rows"]) > 0


def test_found_on_the_edited_model_there_is_one_strength() -> None:
    """What is added as published is not strengthened."""
    with pytest.raises(InvalidInput, match="one strength"):
        evaluate(mode="sequence", found_on="edited", strengths=[1.0, 2.0])


def test_texts_are_generated_where_there_are_prompts() -> None:
    """GE for the record that brings generation prompts, RS with its reference texts, before and after; none for others."""
    rows = full_result("single")["rows"]
    for when in ("before", "after"):
        assert rows[1][when]["GE"] > 0 and 0 <= rows[1][when]["RS"] <= 1
        assert rows[0][when]["GE"] is None
    assert full_result("single")["after"]["GE"]["n"] == 1


def test_generated_texts_are_reproducible() -> None:
    """The same seed writes the same texts, another one others; each begins with its prompt."""
    replica, _ = make_replica_and_context()
    one, two, other = (
        run_to_completion(generate_texts(replica, ["Big Ben", "The"], seed)) for seed in (0, 0, 1)
    )
    assert one == two != other
    assert one[0].startswith("Big Ben")


def test_records_that_do_not_fit_the_model_are_left_out() -> None:
    """A record that does not fit is named with the reason; when none is left the evaluation is refused."""
    long = replace(RECORDS[0], name="record 9", prompt="The {} " + "is " * 80)
    result = evaluate(records=[long, RECORDS[1]], damage=False)
    assert [x["record"] for x in result["records"]["left_out"]] == ["record 9"]
    assert "positions" in result["records"]["left_out"][0]["reason"]
    with pytest.raises(InvalidInput, match="no record can be evaluated"):
        evaluate(records=[long])


def test_damage_texts_exclude_edited_facts() -> None:
    """A text that names a subject together with its true object is no measure of damage; others are."""
    assert texts_without_edited_facts(DAMAGE_CORPUS.texts, RECORDS[:1]) == list(DAMAGE_CORPUS.texts[1:])
    assert texts_without_edited_facts(["Marie Curie sang.", "She sang."], [RECORDS[3]]) == ["She sang."]
    with pytest.raises(InvalidInput, match="give other plain texts"):
        run_to_completion(
            run_evaluation(
                *make_replica_and_context(),
                EvaluationPlan(),
                RECORDS,
                InMemoryStore(),
                Corpus("one", (TEXTS[0],)),
            )
        )


def test_the_true_object_is_what_is_erased_or_amplified() -> None:
    """More of it is left where it is amplified than where it is erased; a record that names none is left out."""
    erased, amplified = (evaluate(objective=o, damage=False) for o in ("erase", "amplify"))
    for result in (erased, amplified):
        assert [x["record"] for x in result["records"]["left_out"]] == ["record 3"]
        assert "add `target_true`" in result["records"]["left_out"][0]["reason"]

    def p_true(row: dict[str, Any]) -> float:
        return float(row["after"]["p_new"] - row["after"]["EM"])

    for less, more in zip(erased["rows"], amplified["rows"], strict=True):
        assert p_true(less) < p_true(more)
        assert less["before"] == more["before"]

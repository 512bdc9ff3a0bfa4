"""Evaluation of edits on a set of records, each alone or in sequence: service.evaluation.runner."""

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
from service.editing.strengthen import Assessment
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.errors import InvalidInput
from service.evaluation import evaluation_run, strengths
from service.evaluation.measuring import generate_texts, texts_without_edited_facts
from service.evaluation.metrics import PromptScores
from service.evaluation.runner import run_evaluation
from service.evaluation.suites.registry import SUITE_MEASURES, SUITES
from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.models.scoring import log_probs_blocking
from service.recipes.recipe import Recipe
from service.schemas import EvaluationPlan
from service.weights.factors import Association
from tests.support.in_memory_store import InMemoryStore
from tests.support.tiny_models import TEXTS, tiny

#: the output of a random model depends little on the subject, so that only strong edits change it
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


def make_replica_and_context(model: LoadedModel | None = None) -> tuple[VersionedModel, EditorContext]:
    model = model or tiny()
    return VersionedModel(model, EmptyLedger()), EditorContext(
        model, RECIPE, Corpus("test", tuple(TEXTS)), None
    )


def evaluate(
    store: InMemoryStore | None = None, records: list[Record] = RECORDS, **plan: Any
) -> dict[str, Any]:
    stepper = run_evaluation(
        *make_replica_and_context(),
        EvaluationPlan(**plan),
        records,
        InMemoryStore() if store is None else store,
        DAMAGE_CORPUS,
    )
    return run_to_completion(stepper)


def without_timings(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result without the fields that hold times."""
    return {k: v for k, v in result.items() if k not in ("seconds", "edits_per_minute")}


PLANS: dict[str, dict[str, Any]] = {
    "single": {
        "mode": "single",
        "strengths": [1.0, 2.0],
        "generation": True,
        "suites": ["free", "consistency", "divergence"],
    },
    "composed": {
        "mode": "sequence",
        "checkpoints": [1, 3],
        "strengths": [1.0, 2.0],
        "batch_size": 2,
        "suites": ["negation", "prefixes", "portability", "free"],
    },
    "added": {"mode": "sequence", "checkpoints": [2], "search_model": "edited"},
}


@lru_cache
def full_result(name: str) -> dict[str, Any]:
    return evaluate(**PLANS[name])


@pytest.mark.parametrize("name", PLANS)
def test_result_is_json_with_a_row_for_every_record(name: str) -> None:
    """The result has one row for each record, in order, and names the model, its parameters and the stages."""
    result = full_result(name)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [r["record"] for r in result["rows"]] == [r.name for r in RECORDS]
    assert result["records"]["measured"] == 5 and result["records"]["missing_fields"]["target_true"] == 1
    assert result["model"]["fingerprint"] == tiny().fingerprint
    assert result["parameters"]["layers"] == [1]
    assert set(result["seconds"]) >= {"find", "measure", "damage"}


@pytest.mark.parametrize("name", PLANS)
def test_suites_give_their_measures_before_and_after(name: str) -> None:
    """Every measure of the suites is in each row, before and after the edits, and in the means of every checkpoint."""
    result = full_result(name)
    measures = {m for suite in PLANS[name].get("suites", ()) for m in SUITES[suite].measures}
    shown = set(SUITE_MEASURES)
    for row in result["rows"]:
        assert shown & set(row["before"]) == shown & set(row["after"]) == measures
    tables = [t["measures"] for t in result.get("checkpoints", ())] + [result["before"], result["after"]]
    assert all(shown & set(means) == measures for means in tables)


def test_half_of_a_sequence_is_reverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every second edit reverted, the others have the measures of a sequence in which the reverted ones never
    were, and each tenth of a sequence is measured by itself."""
    monkeypatch.setattr(evaluation_run, "AGE_GROUPS", 2)
    result = evaluate(mode="sequence", checkpoints=[5], damage=False)
    alone = evaluate(records=RECORDS[0::2], mode="sequence", checkpoints=[3], damage=False)
    half = result["reverted_half"]
    for name in ("ES", "NS", "p_new"):
        assert half["kept"][name]["mean"] == pytest.approx(alone["after"][name]["mean"], abs=1e-6)
    assert half["reverted"] == 2 and half["undone"] == 2 - half["held_by_the_base"]
    assert [(a["first"], a["last"]) for a in result["ages"]] == [(1, 2), (3, 5)]
    newest = [r["after"]["p_new"] for r in result["rows"][2:]]
    assert result["ages"][1]["measures"]["p_new"]["mean"] == pytest.approx(sum(newest) / 3)
    published = evaluate(mode="sequence", checkpoints=[5], damage=False, search_model="edited")
    assert published["reverted_half"] is None and len(published["ages"]) == 2


def test_recall_is_measured_on_facts_that_are_not_edited() -> None:
    """Recall is the share of greedy true objects, on records about subjects that are not edited."""
    others = [replace(r, target_true=t) for r, t in zip(RECORDS, ("a", "is", "the", "in", "b"), strict=True)]
    edited, model = RECORDS[:2], tiny()
    unedited = [r for r in others if r.subject not in {e.subject for e in edited}]
    greedy = [
        model.decode([int(model.model(torch.tensor([model.encode(r.text)[0]])).logits[0, -1].argmax())])
        for r in unedited
    ]
    known = replace(unedited[0], target_true=greedy[0].strip() or "x")
    stepper = run_evaluation(
        *make_replica_and_context(model),
        EvaluationPlan(mode="sequence", checkpoints=[2], damage=False, recall_facts=9),
        edited,
        InMemoryStore(),
        DAMAGE_CORPUS,
        [*others[:2], known, *unedited[1:]],
    )
    recall = run_to_completion(stepper)["checkpoints"][-1]["recall"]
    pairs = [(r.text, str(r.target_true)) for r in (known, *unedited[1:])]
    expected = [is_greedy for _, is_greedy in log_probs_blocking(model, pairs)]
    assert recall["facts"] == 3 and recall["before"] == sum(expected) / 3
    with pytest.raises(InvalidInput, match="no fact table"):
        evaluate(mode="sequence", recall_facts=5)
    with pytest.raises(InvalidInput, match="leave recall_facts out"):
        evaluate(recall_facts=5)


def test_suite_for_conversations_needs_a_chat_template() -> None:
    """A suite that this model cannot answer is refused before anything is computed."""
    with pytest.raises(InvalidInput, match="'chat' needs a model with a chat template: leave it out"):
        evaluate(suites=["free", "chat"])


@pytest.mark.parametrize("name", PLANS)
def test_base_weights_are_unchanged(name: str) -> None:
    """Between the steps of an evaluation and after closing it, the model has its base bytes."""
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
def test_interrupted_evaluation_resumes_to_the_same_result(name: str, seed: int) -> None:
    """Five runs on one store, each closed at a random step, do not change the result of a sixth."""
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
    """A second run on a complete store searches and scores nothing."""
    store = InMemoryStore()
    first = evaluate(store, **PLANS["composed"])

    def computed(*_: Any, **__: Any) -> Stepper[None]:
        yield Progress(Phase.RUN, 0, 1)
        pytest.fail("a stored stage was computed again")

    for name in ("score_targets", "measure_drift"):
        monkeypatch.setattr(f"service.evaluation.measuring.{name}", computed)
    monkeypatch.setattr(EditorContext, "find_all_factors", computed)
    assert evaluate(store, **PLANS["composed"]) == first


def test_store_of_other_inputs_is_refused() -> None:
    """A store that holds results of another plan or set of records is refused."""
    store = InMemoryStore()
    evaluate(store, RECORDS[:1], damage=False)
    for records, damage in ((RECORDS[:1], True), (RECORDS[:2], False)):
        with pytest.raises(InvalidInput, match="another plan, model or set of records"):
            evaluate(store, records, damage=damage)


def p_of(model: LoadedModel, r: Record, target: str) -> float:
    """Return exp of the mean log-probability of an object on a record's prompt."""
    return math.exp(log_probs_blocking(model, [(fill_prompt(r.prompt, r.subject).text, target)])[0][0])


def test_edit_alone_matches_the_editor() -> None:
    """The measures of an edit alone equal those of the model with the updates that the editor finds."""
    result = evaluate(records=RECORDS[:3], damage=False)
    replica, context = make_replica_and_context()
    for r, row in zip(RECORDS[:3], result["rows"], strict=True):
        factors = run_to_completion(context.find_factors(fill_prompt(r.prompt, r.subject), r.target_new))
        with replica.use_patch(replica.compose_patch(factors.updates)) as model:
            new, true = p_of(model, r, r.target_new), p_of(model, r, r.target_true or "")
        assert row["after"]["p_new"] == pytest.approx(new, rel=1e-4)
        assert row["after"]["ES"] == float(new > true)
        assert row["before"]["p_new"] == pytest.approx(p_of(replica.base, r, r.target_new), rel=1e-4)


def test_joint_sequence_composes_all_updates() -> None:
    """A sequence found on the base model ends with all updates composed jointly, as the service does."""
    result = evaluate(mode="sequence", checkpoints=[2])
    replica, context = make_replica_and_context()
    updates = []
    for i, r in enumerate(RECORDS):
        updates += run_to_completion(
            context.find_factors(fill_prompt(r.prompt, r.subject), r.target_new, edit=f"{i:06}")
        ).updates
    patch = replica.compose_patch(updates)
    (site,) = patch.weights
    base = replica.base.parameter(site).data
    relative_change = float((patch.weights[site].double() - base.double()).norm() / base.double().norm())
    assert result["norm"]["1.mlp"] == pytest.approx(relative_change, rel=1e-5)
    with replica.use_patch(patch) as model:
        for r, row in zip(RECORDS, result["rows"], strict=True):
            assert row["after"]["p_new"] == pytest.approx(p_of(model, r, r.target_new), rel=1e-4)


def test_sequence_on_the_edited_model_adds_updates_one_by_one() -> None:
    """Each edit is found on the weights with the edits before it, and its rank-one update is added to them."""
    result = evaluate(records=RECORDS[:3], mode="sequence", search_model="edited", checkpoints=[3])
    replica, context = make_replica_and_context()
    run_to_completion(context.get_contexts(2, 0))
    run_to_completion(context.get_statistics((1,)))
    base = replica.base.weight(1).data
    weight = base.clone()
    for r in RECORDS[:3]:
        replica.base.weight(1).data = weight
        (update,) = run_to_completion(
            context.find_all_factors([EditInput(fill_prompt(r.prompt, r.subject), r.target_new)])
        )[0].updates
        assert isinstance(update, Association)
        weight = (weight.double() + update.rank_one().dense().T).float()  # Conv1D
    relative_change = float((weight - base).double().norm() / base.double().norm())
    assert result["norm"]["1.mlp"] == pytest.approx(relative_change, rel=1e-4)
    replica.base.weight(1).data = weight
    for r, row in zip(RECORDS[:3], result["rows"], strict=True):
        assert row["after"]["p_new"] == pytest.approx(p_of(replica.base, r, r.target_new), rel=1e-3)


def test_checkpoints_measure_all_edits_so_far() -> None:
    """A checkpoint measures all edits so far, the first ones by themselves, and how many still hold."""
    tables = full_result("composed")["checkpoints"]
    assert [t["edits"] for t in tables] == [1, 3, 5]
    assert [t["measures"]["exact"]["n"] for t in tables] == [1, 3, 5]
    assert [[r["first"] for r in t["retention"]] for t in tables] == [[], [1], [3]]
    assert all(0 <= t["still_holding"]["hold"] <= t["still_holding"]["held_before"] for t in tables)
    assert tables[-1]["measures"] == full_result("composed")["after"]
    assert tables[-1]["damage"]["loss_before"] == tables[0]["damage"]["loss_before"]


def test_checkpoints_are_rounded_up_to_whole_groups() -> None:
    """On the edited model a checkpoint within a group moves to the end of the group."""
    result = evaluate(
        mode="sequence", search_model="edited", checkpoints=[1, 2, 3, 1000], batch_size=2, damage=False
    )
    assert [t["edits"] for t in result["checkpoints"]] == [2, 4, 5]


def test_fine_tuning_is_evaluated() -> None:
    """Dense updates of the attention weights are stored, loaded and composed like associations."""
    store = InMemoryStore()
    plan = {"method": "ft-attn", "hparams": {"steps": 2}, "mode": "sequence", "damage": False}
    result = evaluate(store, RECORDS[:2], **plan)
    assert list(result["norm"]) == ["2.qkv"] and result["norm"]["2.qkv"] > 0
    assert evaluate(store, RECORDS[:2], **plan) == result


def test_grace_is_evaluated() -> None:
    """Entries of a codebook are stored, loaded and composed like associations, and no weight changes. A radius of the
    published form gives the same rows where no ball touches another."""
    plan: dict[str, Any] = {"method": "grace", "mode": "sequence", "damage": False}
    hparams = {"layers": [1], "steps": 8, "learning_rate": 0.3, "radius": 1e-3}
    store = InMemoryStore()
    result = evaluate(store, RECORDS[:2], hparams=hparams, **plan)
    assert result["norm"] == {} and result["after"]["ES"]["mean"] == 1.0
    assert evaluate(store, RECORDS[:2], hparams=hparams, **plan) == result
    replayed = evaluate(records=RECORDS[:2], hparams=hparams | {"compat": "hartvigsen2023"}, **plan)
    assert [r["after"] for r in replayed["rows"]] == [r["after"] for r in result["rows"]]


@pytest.mark.parametrize("plan", [{"method": "grace"}, {"hparams": {"form": "gated"}}])
def test_edits_that_are_looked_up_are_not_found_on_the_edited_model(plan: dict[str, Any]) -> None:
    """Nothing of them is added to a weight."""
    with pytest.raises(InvalidInput, match="looked up"):
        evaluate(mode="sequence", search_model="edited", **plan)


def test_ineffective_edit_gets_a_higher_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit alone gets the first strength at which it is accepted, or the last one that passes."""

    def assess(_record: Record, scores: PromptScores, _margin: float) -> Assessment:
        new, true = scores.new, scores.true
        return Assessment(accepted=new.is_greedy if true is None else new.log_p > true.log_p)

    monkeypatch.setattr(strengths, "assess_rewrite", assess)
    weak = evaluate(strengths=[1e-6], damage=False)
    strong = evaluate(strengths=[1e-6, 1e-5, 8.0], damage=False)
    assert {r["strength"] for r in weak["rows"]} == {1e-6}
    for weak_row, row in zip(weak["rows"], strong["rows"], strict=True):
        after = weak_row["after"]
        effective = after["exact"] if weak_row["target_true"] is None else after["ES"]
        assert row["strength"] == (1e-6 if effective else 8.0)
    assert strong["strengthened"] == sum(r["strength"] == 8.0 for r in strong["rows"]) > 0


def test_several_strengths_are_refused_on_the_edited_model() -> None:
    """Updates that are added one by one have a single strength."""
    with pytest.raises(InvalidInput, match="one strength"):
        evaluate(mode="sequence", search_model="edited", strengths=[1.0, 2.0])


def test_generation_measures_need_prompts() -> None:
    """A record with generation prompts and reference texts has GE and RS before and after, other records have none."""
    rows = full_result("single")["rows"]
    for when in ("before", "after"):
        assert rows[1][when]["GE"] > 0 and 0 <= rows[1][when]["RS"] <= 1
        assert rows[0][when]["GE"] is None
    assert full_result("single")["after"]["GE"]["n"] == 1


def test_generated_texts_are_reproducible() -> None:
    """The same seed gives the same texts, another seed gives others, and each text begins with its prompt."""
    replica, _ = make_replica_and_context()
    one, two, other = (
        run_to_completion(generate_texts(replica, ["Big Ben", "The"], seed)) for seed in (0, 0, 1)
    )
    assert one == two != other
    assert one[0].startswith("Big Ben")


def test_records_that_do_not_fit_the_model_are_left_out() -> None:
    """Name and reason of a record that does not fit are in the result. If none is left the evaluation is refused."""
    long = replace(RECORDS[0], name="record 9", prompt="The {} " + "is " * 80)
    result = evaluate(records=[long, RECORDS[1]], damage=False)
    assert [x["record"] for x in result["records"]["left_out"]] == ["record 9"]
    assert "positions" in result["records"]["left_out"][0]["reason"]
    with pytest.raises(InvalidInput, match="no record can be evaluated"):
        evaluate(records=[long])


def test_damage_texts_exclude_edited_facts() -> None:
    """A text that contains a subject and its true object is excluded. If none is left the evaluation is refused."""
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


def test_erase_and_amplify_change_the_true_object() -> None:
    """p(true) is higher after amplifying than after erasing, and a record without a true object is left out."""
    erased, amplified = (evaluate(objective=o, damage=False) for o in ("erase", "amplify"))
    for result in (erased, amplified):
        assert [x["record"] for x in result["records"]["left_out"]] == ["record 3"]
        assert "add `target_true`" in result["records"]["left_out"][0]["reason"]

    def p_true(row: dict[str, Any]) -> float:
        return float(row["after"]["p_new"] - row["after"]["EM"])

    for less, more in zip(erased["rows"], amplified["rows"], strict=True):
        assert p_true(less) < p_true(more)
        assert less["before"] == more["before"]

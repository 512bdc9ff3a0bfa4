"""The localization study: service.studies.localization."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from service.covariance.corpus import Corpus
from service.datasets.record import NeighborProbe, Record
from service.editing.context import EditInput, EditorContext
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.errors import InvalidInput
from service.evaluation.metrics import RecordScores, change_scores, scoring_pairs
from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models.scoring import score_targets
from service.recipes.recipe import Recipe
from service.studies import known_facts as known_module
from service.studies import localization as module
from service.studies.facts import fact_from_record
from service.studies.localization import LocalizationPlan, run_localization_study
from service.studies.localization_stats import trace_effects
from service.tracing.fast_trace import trace_statement
from tests.support.in_memory_store import InMemoryStore
from tests.support.tiny_models import TEXTS, tiny

RECORDS = [
    Record("1", "Big Ben", "{} can be found in", "Rome", "London", ("Big Ben lies in",), (NeighborProbe("Paris is in", "Rome"),)),
    Record("2", "Mount Fuji", "{} rises in", "Brazil", "Japan", ("Mount Fuji is in",), (NeighborProbe("It is in", "Japan"),)),
    Record("3", "Marie Curie", "{} spoke", "Polish", None),
]  # fmt: skip
RECIPE = Recipe(source="test", rome=RomeParameters(layers=(1,), contexts=1, steps=3))
PLAN = LocalizationPlan((0, 2), samples=1, noise=0.5)


@pytest.fixture(autouse=True)
def all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a random model answer every fact with its object."""

    def said(_model: Any, pairs: list[Any], _phase: Phase) -> Stepper[list[tuple[float, bool]]]:
        yield Progress(Phase.PROBE, 1, 1)
        return [(0.0, True) for _ in pairs]

    monkeypatch.setattr(known_module, "compute_log_probs", said)


@pytest.fixture(scope="module")
def replica_and_context() -> tuple[VersionedModel, EditorContext]:
    model = tiny()
    return VersionedModel(model, EmptyLedger()), EditorContext(
        model, RECIPE, Corpus("test", tuple(TEXTS)), None
    )


def score_single_edit(
    replica_and_context: tuple[VersionedModel, EditorContext],
    record: Record,
    layer: int,
    method: str = "rome",
) -> Any:
    """Return the change scores of one edit alone at a layer."""
    replica, context = replica_and_context
    spec = EditInput(
        fill_prompt(record.prompt, record.subject), record.target_new, method, {"layers": [layer]}
    )
    (factors,) = run_to_completion(context.find_all_factors([spec]))
    before = run_to_completion(score_targets(replica.base, scoring_pairs(record)))
    with replica.use_patch(replica.compose_patch(factors.updates)):
        after = run_to_completion(score_targets(replica.base, scoring_pairs(record)))
    return change_scores(
        RecordScores.from_scores(record, before), RecordScores.from_scores(record, after), "write"
    )


def test_scores_and_effects_match_single_edits_and_traces(
    replica_and_context: tuple[VersionedModel, EditorContext],
) -> None:
    """A study's scores equal those of each edit alone, and its effects those of each trace alone."""
    replica, context = replica_and_context
    study = run_to_completion(run_localization_study(replica, context, PLAN, RECORDS, InMemoryStore()))
    assert (study["scored"], study["facts"], study["layers"]) == (2, 2, [0, 2])
    (one,) = study["studies"]
    for place, layer in enumerate(PLAN.layers):
        alone = [score_single_edit(replica_and_context, r, layer) for r in RECORDS[:2]]
        for measure in ("rewrite", "paraphrase", "neighbour"):
            mean = sum(scores[measure] for scores in alone) / 2
            assert one["scores"][measure]["by_layer"]["mean"][place] == pytest.approx(mean, abs=1e-5)
    traced = [
        run_to_completion(
            trace_statement(
                replica.base,
                fact_from_record(r).statement,
                r.target_true,
                kinds=("mlp",),
                window=5,
                samples=1,
                noise=0.5,
            )
        )
        for r in RECORDS[:2]
    ]
    for name, row in study["effects"].items():
        both = [trace_effects(t.to_json())[name] for t in traced]
        assert row["mean"] == pytest.approx([(a + b) / 2 for a, b in zip(*both, strict=True)])


def test_base_weights_are_unchanged(replica_and_context: tuple[VersionedModel, EditorContext]) -> None:
    """After a study with every method the model has its base bytes."""
    replica, context = replica_and_context
    before = {name: p.clone() for name, p in replica.base.model.named_parameters()}
    plan = replace(PLAN, methods=("rome", "ft"), hparams={"ft": {"steps": 2}})
    study = run_to_completion(run_localization_study(replica, context, plan, RECORDS, InMemoryStore()))
    assert [s["method"] for s in study["studies"]] == ["rome", "ft"]
    assert all(torch.equal(p, before[name]) for name, p in replica.base.model.named_parameters())


def test_interrupted_study_resumes(
    replica_and_context: tuple[VersionedModel, EditorContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stored edit is not computed again, a further layer computes only its own edits, and the result is the same."""
    replica, context = replica_and_context
    store, requested = InMemoryStore(), []
    original = context.find_all_factors

    def counted(wishes: Any) -> Any:
        requested.extend(wishes)
        return original(wishes)

    monkeypatch.setattr(context, "find_all_factors", counted)
    stepper = run_localization_study(replica, context, PLAN, RECORDS, store)
    while sum(name.startswith("edit-") for name in store) < 1:
        next(stepper)
    stepper.close()
    requested.clear()
    study = run_to_completion(run_localization_study(replica, context, PLAN, RECORDS, store))
    assert len(requested) == 3
    assert (
        run_to_completion(run_localization_study(replica, context, PLAN, RECORDS, store)) == study
        and len(requested) == 3
    )
    run_to_completion(
        run_localization_study(replica, context, replace(PLAN, layers=(0, 1, 2)), RECORDS, store)
    )
    assert len(requested) == 5 and all(a.hparams["layers"] == [1] for a in requested[3:])


def test_reversal_writes_the_noised_answer(
    replica_and_context: tuple[VersionedModel, EditorContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reversal has the facts whose answer changes under noise, with that answer as the new object."""
    replica, context = replica_and_context
    monkeypatch.setattr(
        module, "noised_greedy_answer", lambda _m, r, _n: {"1": " Brazil", "2": " Japan"}[r.name]
    )
    study = run_to_completion(
        run_localization_study(
            replica, context, replace(PLAN, problems=("reversal",)), RECORDS, InMemoryStore()
        )
    )
    (one,) = study["studies"]
    assert one["facts"] == 1
    mean = score_single_edit(replica_and_context, replace(RECORDS[0], target_new="Brazil"), 2)["rewrite"]
    assert one["scores"]["rewrite"]["by_layer"]["mean"][1] == pytest.approx(mean, abs=1e-5)
    monkeypatch.setattr(module, "noised_greedy_answer", lambda _m, r, _n: f" {r.target_true}")
    with pytest.raises(InvalidInput, match="use more noise"):
        run_to_completion(
            run_localization_study(
                replica, context, replace(PLAN, problems=("reversal",)), RECORDS, InMemoryStore()
            )
        )


def test_problems_become_editor_objectives(
    replica_and_context: tuple[VersionedModel, EditorContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Erase, amplify and force optimise the true object.

    Only forcing noises the subject, with one draw for each fact.
    """
    replica, context = replica_and_context
    requested: list[EditInput] = []
    original = context.find_all_factors

    def heard(wishes: Any) -> Any:
        requested.extend(wishes)
        return original(wishes)

    monkeypatch.setattr(context, "find_all_factors", heard)
    plan = replace(PLAN, layers=(1,), problems=("write", "erase", "amplify", "forcing"))
    study = run_to_completion(run_localization_study(replica, context, plan, RECORDS, InMemoryStore()))
    assert [(a.target, a.objective, a.noise is not None) for a in requested] == [
        ("Rome", "write", False), ("Brazil", "write", False),
        ("London", "erase", False), ("Japan", "erase", False),
        ("London", "amplify", False), ("Japan", "amplify", False),
        ("London", "amplify", True), ("Japan", "amplify", True),
    ]  # fmt: skip
    assert [s["objective"] for s in study["studies"]] == list(plan.problems)


def test_forcing_without_noise_is_amplifying(
    replica_and_context: tuple[VersionedModel, EditorContext],
) -> None:
    """With noise of strength 0 forcing equals amplifying. With noise it differs, and is stored separately."""
    replica, context = replica_and_context
    store = InMemoryStore()

    def scores(noise: float, problem: str) -> Any:
        way: dict[str, Any] = {"methods": ("ft",), "hparams": {"ft": {"learning_rate": 0.02, "steps": 10}}}
        plan = replace(PLAN, layers=(1,), problems=(problem,), noise=noise, **way)
        study = run_to_completion(run_localization_study(replica, context, plan, RECORDS, store))
        return study["studies"][0]["scores"]["rewrite"]["by_layer"]["mean"]

    assert scores(0.0, "forcing") == pytest.approx(scores(0.0, "amplify"), rel=1e-3)
    assert scores(0.5, "amplify") == scores(0.0, "amplify")
    assert scores(0.5, "forcing") != pytest.approx(scores(0.0, "forcing"), rel=1e-3)


def test_invalid_studies_are_refused(
    replica_and_context: tuple[VersionedModel, EditorContext],
) -> None:
    """An unknown hyperparameter and a study without known facts raise InvalidInput."""
    replica, context = replica_and_context
    with pytest.raises(InvalidInput, match=r"hparams\.stepps"):
        run_to_completion(
            run_localization_study(
                replica, context, replace(PLAN, hparams={"rome": {"stepps": 1}}), RECORDS, InMemoryStore()
            )
        )
    with pytest.raises(InvalidInput, match="none of the facts"):
        run_to_completion(run_localization_study(replica, context, PLAN, RECORDS[2:], InMemoryStore()))


def test_nan_scores_become_impossible() -> None:
    """A NaN score becomes a log-probability of minus infinity."""
    from service.models.score import TargetScore

    assert module._nan_as_impossible(TargetScore(float("nan"), False, 0, 1)).log_p == float("-inf")
    assert module._nan_as_impossible(TargetScore(-1.5, False, 0, 1)) == TargetScore(-1.5, False, 0, 1)

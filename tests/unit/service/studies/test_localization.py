"""Every fact edited at every layer, and traced: service.studies.localization."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from service.covariance.corpus import Corpus
from service.datasets.records import Near, Record
from service.editing.context import Asking, Toolkit
from service.engine.versioned_model import NoLedger, Replica
from service.errors import InvalidInput
from service.evaluation.metrics import Answers, ask, changes
from service.kit.steps import Progress, Steps, finish
from service.kit.text import fill
from service.models.scoring import score_steps
from service.recipes.recipe import Recipe, RomeParameters
from service.studies import known_facts as known_module
from service.studies import localization as module
from service.studies.facts import fact_of
from service.studies.localization import LocalizationPlan, localization_steps
from service.studies.localization_stats import effects_of
from service.tracing.fast_trace import trace_steps
from tests.support.tiny_models import TEXTS, tiny

RECORDS = [
    Record("1", "Big Ben", "{} can be found in", "Rome", "London", ("Big Ben lies in",), (Near("Paris is in", "Rome"),)),
    Record("2", "Mount Fuji", "{} rises in", "Brazil", "Japan", ("Mount Fuji is in",), (Near("It is in", "Japan"),)),
    Record("3", "Marie Curie", "{} spoke", "Polish", None),
]  # fmt: skip
RECIPE = Recipe(source="test", rome=RomeParameters(layers=(1,), contexts=1, steps=3))
PLAN = LocalizationPlan((0, 2), samples=1, noise=0.5)


class Memory(dict[str, bytes]):
    """What is kept, at hand."""

    def put(self, name: str, data: bytes) -> None:
        self[name] = data


@pytest.fixture(autouse=True)
def all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model knows nothing: it is taken at its word that it does."""

    def said(_model: Any, pairs: list[Any], _phase: str) -> Steps[list[tuple[float, bool]]]:
        yield Progress("ask", 1, 1)
        return [(0.0, True) for _ in pairs]

    monkeypatch.setattr(known_module, "log_prob_steps", said)


@pytest.fixture(scope="module")
def shop() -> tuple[Replica, Toolkit]:
    model = tiny()
    return Replica(model, NoLedger()), Toolkit(model, RECIPE, Corpus("test", tuple(TEXTS)), None)


def by_hand(shop: tuple[Replica, Toolkit], record: Record, layer: int, method: str = "rome") -> Any:
    """One edit alone at a layer, and its scores."""
    replica, toolkit = shop
    asking = Asking(fill(record.prompt, record.subject), record.target_new, method, {"layers": [layer]})
    (found,) = finish(toolkit.find_together_steps([asking]))
    before = finish(score_steps(replica.base, ask(record)))
    with replica.stand(replica.composed(found.pieces)):
        after = finish(score_steps(replica.base, ask(record)))
    return changes(Answers.of(record, before), Answers.of(record, after), "write")


def test_scores_and_effects_are_those_of_each_alone(shop: tuple[Replica, Toolkit]) -> None:
    """What a study averages is what each edit alone does at each layer, and what each trace alone shows."""
    replica, toolkit = shop
    study = finish(localization_steps(replica, toolkit, PLAN, RECORDS, Memory()))
    assert (study["asked"], study["facts"], study["layers"]) == (2, 2, [0, 2])
    (one,) = study["studies"]
    for place, layer in enumerate(PLAN.layers):
        alone = [by_hand(shop, r, layer) for r in RECORDS[:2]]
        for measure in ("rewrite", "paraphrase", "neighbour"):
            mean = sum(scores[measure] for scores in alone) / 2
            assert one["scores"][measure]["by_layer"]["mean"][place] == pytest.approx(mean, abs=1e-5)
    traced = [
        finish(
            trace_steps(
                replica.base,
                fact_of(r).statement,
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
        both = [effects_of(t.to_json())[name] for t in traced]
        assert row["mean"] == pytest.approx([(a + b) / 2 for a, b in zip(*both, strict=True)])


def test_the_weights_are_as_they_were(shop: tuple[Replica, Toolkit]) -> None:
    """After a study the model holds its base bytes, by every method."""
    replica, toolkit = shop
    before = {name: p.clone() for name, p in replica.base.model.named_parameters()}
    plan = replace(PLAN, methods=("rome", "ft"), hparams={"ft": {"steps": 2}})
    study = finish(localization_steps(replica, toolkit, plan, RECORDS, Memory()))
    assert [s["method"] for s in study["studies"]] == ["rome", "ft"]
    assert all(torch.equal(p, before[name]) for name, p in replica.base.model.named_parameters())


def test_a_study_goes_on_where_it_was(shop: tuple[Replica, Toolkit], monkeypatch: pytest.MonkeyPatch) -> None:
    """No edit that was measured is found again; a further layer finds its own edits only; the result is the same."""
    replica, toolkit = shop
    kept, asked = Memory(), []
    whole = toolkit.find_together_steps

    def counted(wishes: Any) -> Any:
        asked.extend(wishes)
        return whole(wishes)

    monkeypatch.setattr(toolkit, "find_together_steps", counted)
    steps = localization_steps(replica, toolkit, PLAN, RECORDS, kept)
    while sum(name.startswith("edit-") for name in kept) < 1:
        next(steps)
    steps.close()
    asked.clear()
    study = finish(localization_steps(replica, toolkit, PLAN, RECORDS, kept))
    assert len(asked) == 3
    assert finish(localization_steps(replica, toolkit, PLAN, RECORDS, kept)) == study and len(asked) == 3
    finish(localization_steps(replica, toolkit, replace(PLAN, layers=(0, 1, 2)), RECORDS, kept))
    assert len(asked) == 5 and all(a.hparams["layers"] == [1] for a in asked[3:])


def test_a_reversal_writes_what_noise_makes_the_model_say(
    shop: tuple[Replica, Toolkit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts whose answer noise leaves as it is are left out of it; of the others that answer is the new object."""
    replica, toolkit = shop
    monkeypatch.setattr(module, "noised_answer", lambda _m, r, _n: {"1": " Brazil", "2": " Japan"}[r.name])
    study = finish(
        localization_steps(replica, toolkit, replace(PLAN, problems=("reversal",)), RECORDS, Memory())
    )
    (one,) = study["studies"]
    assert one["facts"] == 1
    mean = by_hand(shop, replace(RECORDS[0], target_new="Brazil"), 2)["rewrite"]
    assert one["scores"]["rewrite"]["by_layer"]["mean"][1] == pytest.approx(mean, abs=1e-5)
    monkeypatch.setattr(module, "noised_answer", lambda _m, r, _n: f" {r.target_true}")
    with pytest.raises(InvalidInput, match="use more noise"):
        finish(localization_steps(replica, toolkit, replace(PLAN, problems=("reversal",)), RECORDS, Memory()))


def test_what_an_edit_is_for_is_what_the_editor_is_asked(
    shop: tuple[Replica, Toolkit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To erase, amplify or force is asked of the true object; only to force it stands noise on the subject, one for each fact."""
    replica, toolkit = shop
    asked: list[Asking] = []
    whole = toolkit.find_together_steps

    def heard(wishes: Any) -> Any:
        asked.extend(wishes)
        return whole(wishes)

    monkeypatch.setattr(toolkit, "find_together_steps", heard)
    plan = replace(PLAN, layers=(1,), problems=("write", "erase", "amplify", "forcing"))
    study = finish(localization_steps(replica, toolkit, plan, RECORDS, Memory()))
    assert [(a.target, a.objective, a.noise is not None) for a in asked] == [
        ("Rome", "write", False), ("Brazil", "write", False),
        ("London", "erase", False), ("Japan", "erase", False),
        ("London", "amplify", False), ("Japan", "amplify", False),
        ("London", "amplify", True), ("Japan", "amplify", True),
    ]  # fmt: skip
    assert [s["objective"] for s in study["studies"]] == list(plan.problems)


def test_forcing_without_noise_is_amplifying(shop: tuple[Replica, Toolkit]) -> None:
    """With noise of strength nothing the two problems are one; with noise they are not, and each is kept for itself."""
    replica, toolkit = shop
    kept = Memory()

    def scores(noise: float, problem: str) -> Any:
        way = {"methods": ("ft",), "hparams": {"ft": {"learning_rate": 0.02, "steps": 10}}}
        plan = replace(PLAN, layers=(1,), problems=(problem,), noise=noise, **way)
        study = finish(localization_steps(replica, toolkit, plan, RECORDS, kept))
        return study["studies"][0]["scores"]["rewrite"]["by_layer"]["mean"]

    assert scores(0.0, "forcing") == pytest.approx(scores(0.0, "amplify"), rel=1e-3)
    assert scores(0.5, "amplify") == scores(0.0, "amplify")
    assert scores(0.5, "forcing") != pytest.approx(scores(0.0, "forcing"), rel=1e-3)


def test_what_cannot_be_is_refused_at_once(shop: tuple[Replica, Toolkit]) -> None:
    """A hyperparameter that there is not, and a study without any fact."""
    replica, toolkit = shop
    with pytest.raises(InvalidInput, match=r"hparams\.stepps"):
        finish(
            localization_steps(
                replica, toolkit, replace(PLAN, hparams={"rome": {"stepps": 1}}), RECORDS, Memory()
            )
        )
    with pytest.raises(InvalidInput, match="none of the facts"):
        finish(localization_steps(replica, toolkit, PLAN, RECORDS[2:], Memory()))


def test_a_broken_model_says_nothing() -> None:
    """Where an edit leaves no number, the object has no probability."""
    from service.models.score import Score

    assert module._sound(Score(float("nan"), False, 0, 1)).log_p == float("-inf")
    assert module._sound(Score(-1.5, False, 0, 1)) == Score(-1.5, False, 0, 1)

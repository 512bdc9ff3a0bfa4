"""One edit from the request to the ledger, with the real desk, store and broker: service.editing.edit_job."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from service.application import Operations
from service.covariance.corpus import Corpus
from service.db.database import Database
from service.editing import candidate, edit_job
from service.editing.candidate import Check, Draft, Measured, Trial
from service.editing.context import Toolkit
from service.editing.edit_job import companies, edits_steps, strengthened_steps
from service.editing.methods.registry import find_steps, find_together_steps
from service.editing.probes import Answer, Question, holds, keeps
from service.engine.versioned_model import Replica
from service.errors import Cancelled, Conflict, InvalidInput, PalimpsestError, Unavailable
from service.jobs.job_store import Desk, RunningJob
from service.jobs.memory_broker import MemoryBroker
from service.kit.steps import Ended, Progress, Steps, Told, Working, finish
from service.kit.text import fill
from service.models.loading import Site
from service.models.scoring import log_probs
from service.models.token_batch import prompt_and_target
from service.recipes.recipe import Recipe, RomeParameters
from service.schemas import EditRequest
from service.settings import Settings
from service.weights.composition import compose_layer, pack, rebuild, unpack
from tests.support.tiny_models import TEXTS, tiny

torch.set_num_threads(1)

Resource = dict[str, Any]
#: A random model listens to a subject that ends the prompt, and to little else.
PROMPT = "Look at the {}"
HPARAMS = {"steps": 12, "contexts": 3, "kl_factor": 0.0, "weight_decay": 0.0, "clamp": 20.0}
RECIPE = Recipe(source="test", rome=RomeParameters.model_validate({"layers": (1,), **HPARAMS}))
LOOSE = {
    "min_probability": 0.0,
    "min_neighborhood": 0.0,
    "max_perplexity": 1e6,
    "max_norm": 1e6,
    "max_broken": 1000,
}
OFF = {"enabled": False}


def toolkit_for(model: Any) -> Toolkit:
    return Toolkit(model, RECIPE, Corpus("test", tuple(TEXTS)), None)


@lru_cache
def tools() -> Toolkit:
    """Statistics and contexts of the tiny model, made once."""
    kit = toolkit_for(tiny())
    finish(kit.statistics_steps([0, 1]))
    finish(kit.contexts_steps(3, 0))
    return kit


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, made once and copied."""
    file = tmp_path_factory.mktemp("database") / "empty.sqlite3"
    database = Database(f"sqlite:///{file}")
    database.migrate()
    database.close()
    return file


def alone(steps: Working) -> Steps[None]:
    """The steps of one job; what it ended with is raised."""
    for news in steps:
        if isinstance(news, Ended):
            if news.error is not None:
                raise news.error
        else:
            yield news.progress if isinstance(news, Told) else news


class Workshop:
    """A tiny model with everything that an edit needs, and the doors through which it is asked for."""

    def __init__(self, folder: Path, migrated: Path) -> None:
        file = folder / "palimpsest.sqlite3"
        shutil.copy(migrated, file)
        self.model = tiny()
        self.toolkit = toolkit_for(self.model)
        self.toolkit.statistics |= tools().statistics
        self.toolkit.contexts |= tools().contexts
        self.database = Database(f"sqlite:///{file}")
        self.broker = MemoryBroker()
        self.do = Operations(self.database, self.broker, Settings(data=folder))
        self.desk = Desk(self.database, self.broker, self.model.fingerprint, "worker-1", sole=True)
        info = {"name": "tiny", "layers": 3, "positions": 64, "width": 16, **self.toolkit.info()}
        self.desk.register(info, self.model.tokenizer.backend_tokenizer.to_str())
        self.replica = Replica(self.model, self.desk)
        self.base = {x: self.model.weight(x).data.clone() for x in range(3)}

    def ask(
        self, subject: str = "Eiffel Tower", new: str | None = "is", true: str | None = "the", **more: Any
    ) -> str:
        request = {
            "subject": subject,
            "prompt": PROMPT,
            "target_new": new,
            "target_true": true,
            "guard": LOOSE,
        }
        return str(self.do.edits.submit([EditRequest.model_validate(request | more)], "somebody")[0]["id"])

    def begin(self, edit: str) -> tuple[RunningJob, Steps[None]]:
        job = self.desk.start(edit)
        assert job is not None
        return job, alone(edits_steps(self.replica, self.desk, [job], self.toolkit))

    def edit(self, *asked: Any, **more: Any) -> Resource:
        """Ask, carry out, and read how it ended."""
        edit = self.ask(*asked, **more)
        finish(self.begin(edit)[1], lambda _: self.assert_base())
        return self.do.edits.get(edit)

    def revert(self, edit: Resource) -> Resource:
        return self.do.edits.revert(edit["id"], "somebody")

    def entry(self, version: int) -> dict[str, Any]:
        return self.do.ledger.page()["items"][version - 1]["body"]  # type: ignore[no-any-return]

    def assert_base(self) -> None:
        """The resident model holds its base bytes."""
        assert all(torch.equal(self.model.weight(x).data, w) for x, w in self.base.items())

    def close(self) -> None:
        self.broker.close()
        self.database.close()


@pytest.fixture
def opened(tmp_path: Path, migrated: Path) -> Iterator[Callable[[], Workshop]]:
    """Opens as many workshops as a test wants."""
    shops: list[Workshop] = []

    def open_one() -> Workshop:
        folder = tmp_path / str(len(shops))
        folder.mkdir()
        shops.append(Workshop(folder, migrated))
        return shops[-1]

    yield open_one
    for shop in shops:
        shop.close()


@pytest.fixture
def shop(opened: Callable[[], Workshop]) -> Workshop:
    return opened()


def same(one: Any, two: Any) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[x], two[x]) for x in one)


# landing


def test_an_edit_lands(shop: Workshop) -> None:
    """An applied edit has a version, factors and figures, and its entry in the ledger holds; the model speaks it."""
    edit = shop.edit()
    assert (edit["status"], edit["version"], shop.do.ledger.head()) == ("applied", 1, 1)
    result = edit["result"]
    assert result["guard"]["passed"] and result["reason"] is None
    assert result["scores"]["before"]["ES"] == 0.0 and result["scores"]["after"]["ES"] == 1.0
    assert result["rewrite"]["after"]["new"] > result["rewrite"]["before"]["new"]
    assert result["rewrite"]["says"].strip().startswith("is")
    assert result["layers"] == [1]
    assert shop.do.ledger.verify()["ok"]
    shop.assert_base()


def test_the_version_is_the_rank_one_update(shop: Workshop) -> None:
    """The weight of a version with one edit is base + delta (C^-1 k)^T / (k^T C^-1 k), exactly, and no other weight differs."""
    edit = shop.edit()
    (association,) = unpack(shop.do.edits.delta(edit["id"]), edit["id"], "Eiffel Tower")
    weights = shop.replica.weights(1)
    assert list(weights) == [Site(1)]
    assert torch.equal(weights[Site(1)], rebuild(shop.base[1], association.rank_one(), conv1d=True))
    assert torch.linalg.matrix_rank(compose_layer([association]).dense()) == 1


@pytest.mark.parametrize("layers", [[1], [0, 1]])
@pytest.mark.parametrize("subject", ["Eiffel Tower", " Eiffel  Tower"])
def test_what_was_tried_is_what_lands(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, subject: str, layers: list[int]
) -> None:
    """The weights that were measured are bit for bit those of the version, with others active and odd white space."""
    shop.edit("Big Ben", "city")
    shop.edit("Eiffel Tower", "in", prompt="We know the {}")
    tried: list[Any] = []
    composed = Replica.composed
    monkeypatch.setattr(Replica, "composed", lambda self, x: tried.append(composed(self, x)) or tried[-1])
    edit = shop.edit(subject, hparams={"layers": layers}, guard=OFF)
    assert edit["version"] == 3
    assert same(tried[-1], Replica(shop.model, shop.desk).weights(3))


def test_the_provenance_gives_the_same_factors(shop: Workshop) -> None:
    """What the ledger holds of an edit, replayed on a fresh base model, gives its factors bit for bit."""
    shop.edit("Big Ben", "city")
    edit = shop.edit(hparams={"clamp": 3.0})
    body = shop.entry(2)
    model = tiny()
    assert body["fingerprint"] == model.fingerprint
    kit = toolkit_for(model)
    assert body["corpus"] == kit.corpus.digest
    parameters = RomeParameters.model_validate(body["hparams"])
    contexts = finish(kit.contexts_steps(parameters.contexts, parameters.seed))
    statistics = finish(kit.statistics_steps(parameters.layers))
    assert body["statistics"] == {str(x): s.digest for x, s in statistics.items()}
    statement = fill(body["prompt"], body["subject"])
    found = finish(find_steps(model, statistics, contexts, statement, body["target_new"], parameters))
    assert pack([a.scaled(body["strength"]) for a in found.pieces]) == shop.do.edits.delta(edit["id"])


def test_the_provenance_names_everything(shop: Workshop) -> None:
    """Hyperparameters in full, seed, statistics, dtype, device, libraries, strength and the objects are in the entry."""
    shop.edit(true=None)
    body = shop.entry(1)
    assert set(RomeParameters.model_fields) == set(body["hparams"])
    assert (body["dtype"], body["device"], body["strength"]) == ("float32", "cpu", 1.0)
    assert set(body["libraries"]) == {"torch", "transformers", "python"}
    assert (body["method"], body["target_new"], body["target_true"]) == ("rome", "is", None)
    assert body["resolved_true"]


def test_an_edit_is_the_same_whatever_is_active(opened: Callable[[], Workshop]) -> None:
    """Factors are found on the base model: with other edits active, or the same subject's, they are the same bytes."""
    alone, beside = opened(), opened()
    first = alone.edit(guard=OFF)
    beside.edit("Big Ben", "city")
    beside.edit("Eiffel Tower", "in", prompt="We know the {}")
    second = beside.edit(guard=OFF)
    assert second["version"] == 3
    assert alone.do.edits.delta(first["id"]) == beside.do.edits.delta(second["id"])


def test_a_prompt_as_long_as_the_model_can_be_edited(shop: Workshop) -> None:
    """A prompt that leaves no room for contexts, nor for a long true object, is edited without them."""
    room = shop.model.positions
    prompt = "a" * (room - 1 - len(shop.model.encode(" Big Ben is")[0])) + " {}"
    edit = shop.edit(
        "Big Ben",
        true=None,
        prompt=prompt,
        guard=OFF,
        probes={"neighborhood": [{"prompt": prompt.replace("{}", "Big Ben"), "target": "is"}]},
    )
    assert edit["status"] == "applied", edit["error"]
    assert edit["result"]["rewrite"]["after"]["new"] > edit["result"]["rewrite"]["before"]["new"]


def test_two_workers_stand_at_the_same_bytes(shop: Workshop) -> None:
    """Another replica of the same model rebuilds every version with the same digest."""
    shop.edit()
    shop.edit("Big Ben", "city")
    other = Replica(tiny(), Desk(shop.database, shop.broker, shop.model.fingerprint, "worker-2"))
    assert [other.digest(v) for v in range(3)] == [shop.replica.digest(v) for v in range(3)]


def test_the_true_object_is_what_the_base_model_says(shop: Workshop) -> None:
    """When no true object is named, it is the base model's own answer, even while another edit of the fact is active."""
    first = shop.edit(true=None)
    second = shop.edit(new="city", true=None)
    assert first["result"]["target_true"] == second["result"]["target_true"] != "is"


# rejecting


def test_an_edit_that_does_not_take_is_rejected(shop: Workshop) -> None:
    """Without a change of value the old object stays more probable: the edit is rejected at its first strength."""
    edit = shop.edit(hparams={"steps": 1})
    assert edit["status"] == "rejected"
    assert "did not take" in edit["result"]["reason"]
    assert edit["result"]["strength"] == 1.0


# Each rule with a request that breaks it and no other.
BREAKING: dict[str, dict[str, Any]] = {
    "efficacy": {"hparams": {"steps": 1}},
    "probability": {"guard": LOOSE | {"min_probability": 0.999}},
    "paraphrase": {"guard": LOOSE | {"min_paraphrase": 1.0}, "probes": {"paraphrase": ["In which country"]}},
    "neighborhood": {
        "guard": LOOSE | {"min_neighborhood": 1.0},
        "probes": {"neighborhood": [{"prompt": "Look at the Eiffel Tower", "target": "the"}]},
    },
    "perplexity": {"subject": "Big Ben", "guard": LOOSE | {"max_perplexity": 1.0}},
    "norm": {"guard": LOOSE | {"max_norm": 1e-6}},
    "broken": {
        "prompt": "We like the {}",  # the other way for the same subject
        "new": "the",
        "true": "is",
        "guard": LOOSE | {"max_broken": 0},
        "hparams": {"clamp": 80.0, "steps": 15},
    },
}


#: An edit that holds, but not by much.
WEAK: dict[str, Any] = {"hparams": {"steps": 6}, "guard": OFF}


@pytest.mark.parametrize("rule", BREAKING)
def test_every_rule_can_reject(shop: Workshop, rule: str) -> None:
    """An edit that breaks one rule is rejected with that rule's figure and limit; ledger, factors and model are as before."""
    if rule == "broken":
        shop.edit(**WEAK)
    head = shop.do.ledger.head()
    edit = shop.edit(**BREAKING[rule])
    checks = edit["result"]["guard"]["checks"]
    assert [c["name"] for c in checks if not c["passed"]] == [rule]
    assert edit["status"] == "rejected" and edit["version"] is None
    assert shop.do.ledger.head() == head
    (check,) = (c for c in checks if c["name"] == rule)
    assert f"({check['figure']:.3g}, limit {check['limit']:.3g})" in edit["result"]["reason"]
    assert edit_job._REASONS[rule] in edit["result"]["reason"]
    shop.assert_base()
    assert shop.do.ledger.verify()["ok"]


def test_the_norm_is_the_edits_own(shop: Workshop) -> None:
    """What the guard calls the norm of an edit is its own share, however much other edits have changed."""
    alone = shop.edit(dry_run=True)["result"]["norm_ratio"]
    for prompt in ("We like the {}", "This is the {}"):
        assert shop.edit(prompt=prompt)["status"] == "applied"
    together = shop.edit(dry_run=True)["result"]
    # Of one subject, so that the plain rank-one changes add up; the strength may differ.
    ratio = together["norm_ratio"]["1"] / together["strength"]
    assert ratio == pytest.approx(alone["1"], rel=1e-3)


def test_without_the_guard_anything_lands(shop: Workshop) -> None:
    """With the guard off, an edit that did not take lands all the same, and its result says so."""
    edit = shop.edit(hparams={"steps": 1}, guard=OFF)
    assert edit["status"] == "applied"
    assert not edit["result"]["guard"]["passed"]


def test_broken_edits_are_named(shop: Workshop) -> None:
    """An edit that makes another cease to hold names it, and lands only when that is allowed."""
    first = shop.edit(**WEAK)
    edit = shop.edit(**BREAKING["broken"] | {"guard": LOOSE})
    assert edit["status"] == "applied"
    assert edit["result"]["broken"] == [first["id"]]


def test_a_dry_run_lands_nothing(shop: Workshop) -> None:
    """A dry run that would land ends as evaluated, with its figures; no version, no factors, no entry."""
    edit = shop.edit(dry_run=True)
    assert (edit["status"], edit["version"], shop.do.ledger.head()) == ("evaluated", None, 0)
    assert edit["result"]["guard"]["passed"]
    assert shop.edit(dry_run=True, hparams={"steps": 1})["status"] == "rejected"
    assert shop.desk.active_at(0) == []
    assert shop.do.models.resident()["active_edits"] == 0
    shop.assert_base()


@pytest.mark.parametrize("limit", [candidate._at_least, candidate._at_most])
def test_no_number_passes_no_rule(limit: Callable[[str, float, float], Check]) -> None:
    """A figure that is not a number fails, whichever way the rule goes."""
    assert not limit("norm", float("nan"), 1.0).passed


def test_writing_what_the_model_says_already(shop: Workshop) -> None:
    """New and true object may be one, up to white space: the edit holds when the model says it, and is watched as others are."""
    for new in ("is", " is"):
        assert shop.edit(new=new, true="is")["status"] == "applied"
    silent, saying = Answer(-1.0, -1.0, False, False), Answer(-1.0, -1.0, True, True)
    question = Question("p", " is", "is")
    assert holds(question, saying) and not holds(question, silent)
    assert not holds(Question("p", "is", "the"), saying)


# strengthening


def test_a_weak_edit_is_strengthened(shop: Workshop) -> None:
    """An edit that does not take is tried stronger; the strength is recorded and the factors are those that were tried."""
    weak = {"clamp": 2.0}
    plain = shop.edit(hparams=weak, guard=OFF)
    shop.revert(plain)
    edit = shop.edit(hparams=weak)
    strength = edit["result"]["strength"]
    assert edit["status"] == "applied" and strength in (1.25, 1.5, 2.0)
    assert shop.entry(edit["version"])["strength"] == strength
    (one,) = unpack(shop.do.edits.delta(plain["id"]), "e", "s")
    (more,) = unpack(shop.do.edits.delta(edit["id"]), "e", "s")
    assert torch.equal(one.value * strength, more.value)
    assert torch.equal(one.key, more.key)


@pytest.mark.parametrize(
    ("leads", "strength"),
    [
        (((1.0, 20.0),), 1.0),  # there is room: at full strength from the start
        (((0.0, 20.0),), 1.0),  # raised to full strength, where the margin is enough
        (((0.0, 0.0),), 0.9),  # any lead is enough
    ],
)
def test_an_edit_climbs_as_the_recipe_says(
    shop: Workshop, leads: tuple[tuple[float, float], ...], strength: float
) -> None:
    """How strong an edit lands depends on the lead that is enough with so many active; what it landed with is in the ledger."""
    edit = shop.edit(hparams={"strengths": [0.9, 1.0], "leads": leads}, true="the")
    assert (edit["status"], edit["result"]["strength"]) == ("applied", strength)
    assert shop.entry(edit["version"])["strength"] == strength


MISS, QUIET, SPOKEN, HARM = "misses", "passes unspoken", "is spoken", "does harm"


@pytest.mark.parametrize(
    ("seen", "strength", "passed"),
    [
        ([SPOKEN], 1.0, True),
        ([QUIET, SPOKEN], 1.25, True),
        ([MISS, MISS, MISS, SPOKEN], 2.0, True),
        ([QUIET, HARM], 1.0, True),
        ([MISS, QUIET, HARM], 1.25, True),
        ([MISS, QUIET, QUIET, HARM], 1.5, True),
        ([QUIET, QUIET, QUIET, QUIET], 2.0, True),
        ([MISS, MISS, MISS, MISS], 1.0, False),
        ([MISS, HARM], 1.0, False),
        ([HARM], 1.0, False),
    ],
)
def test_which_strength_is_chosen(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, seen: list[str], strength: float, passed: bool
) -> None:
    """The first that the model speaks, else the strongest that passes, else none; what does harm is not made stronger."""
    left = iter(seen)

    def judge(
        _plan: object, _before: object, _after: object, strength: float, norms: dict[int, float], _: float
    ) -> Trial:
        what = next(left)
        answer = Answer(-1.0, -2.0, what == SPOKEN, False)
        checks = [Check("efficacy", what != MISS, 0, 0), Check("norm", what != HARM, 0, 0)]
        measured = Measured([answer], "", 1.0, set())
        return Trial(strength, measured, measured, checks, norms, [])

    monkeypatch.setattr(candidate, "judge", judge)
    job, _ = shop.begin(shop.ask())
    request = EditRequest.model_validate(job.request)
    plan = finish(edit_job.plan_steps(shop.replica, request, shop.toolkit))
    wanted = finish(edit_job.want_steps(shop.replica, shop.toolkit, plan, job.id))
    (found,) = finish(find_together_steps(shop.model, shop.toolkit.statistics, [wanted]))
    draft = Draft(plan, found)
    stand = finish(candidate.stand_steps(shop.replica, shop.toolkit, [draft], 0))
    best = finish(strengthened_steps(shop.replica, shop.toolkit, draft, stand))
    assert (best.strength, best.passed) == (strength, passed)
    assert next(left, None) is None


# erasing and amplifying


def test_an_erased_object_is_no_longer_said(shop: Workshop) -> None:
    """An erasure lands when the true object is not said any more and at least half of its probability is gone."""
    true = "the"
    edit = shop.edit(new=None, true=true, objective="erase")
    assert (edit["status"], edit["target_new"], edit["objective"]) == ("applied", None, "erase")
    result = edit["result"]
    before, after = (result["rewrite"][when]["true"] for when in ("before", "after"))
    assert after < before
    check = result["guard"]["checks"][0]
    tokens = len(prompt_and_target(shop.model, fill(PROMPT, "Eiffel Tower").text, true)[1])
    gone = 1 - (after / before) ** tokens
    assert check["name"] == "efficacy" and check["figure"] == pytest.approx(gone, rel=1e-4)
    assert result["scores"]["after"]["ES"] == 1.0
    assert shop.entry(1)["objective"] == "erase" and shop.entry(1)["resolved_true"] == true


def test_an_erasure_that_leaves_too_much_is_rejected(shop: Workshop) -> None:
    """Below the least share that must be gone the guard says so, and nothing lands."""
    edit = shop.edit(new=None, true="the", objective="erase", hparams={"steps": 1})
    assert edit["status"] == "rejected"
    assert "too little of its probability is gone" in edit["result"]["reason"]
    assert shop.do.ledger.head() == 0


def test_to_amplify_is_to_write_the_true_object(shop: Workshop) -> None:
    """An amplification's factors are, bit for bit, those of writing the true object; its figure is the share of the gain."""
    written = shop.edit(new="is", true="is", guard=OFF)
    amplified = shop.edit(new=None, true="is", objective="amplify", guard=OFF)
    factors = [unpack(shop.do.edits.delta(e["id"]), "e", "s") for e in (written, amplified)]
    strengths = [e["result"]["strength"] for e in (written, amplified)]
    assert strengths[0] == strengths[1]
    assert torch.equal(factors[0][0].value, factors[1][0].value)  # type: ignore[union-attr]
    assert amplified["result"]["guard"]["checks"][0]["limit"] == 0.5


def test_erasing_and_writing_supersede_each_other(shop: Workshop) -> None:
    """One fact, one edit: the later of a write and an erasure stands, and what an erasure takes away is measured without the
    write that it supersedes."""
    true = "the"
    alone = shop.edit(new=None, true=true, objective="erase", dry_run=True)["result"]["guard"]["checks"][0]
    written = shop.edit(true=true)
    erased = shop.edit(new=None, true=true, objective="erase")
    assert shop.do.edits.get(written["id"])["status"] == "superseded"
    assert erased["result"]["guard"]["checks"][0]["figure"] == pytest.approx(alone["figure"], rel=1e-4)
    again = shop.edit(true=true)
    assert shop.do.edits.get(erased["id"])["superseded_by"] == again["id"]
    shop.revert(again)
    assert shop.do.edits.get(erased["id"])["status"] == "applied"
    assert shop.do.ledger.verify()["ok"]


def test_an_erased_edit_is_watched_for_its_silence() -> None:
    """An erasure holds while its object is not said; an amplification while it is; neighbours then keep what they say."""
    silent, saying = Answer(-1.0, -1.0, False, False), Answer(-1.0, -1.0, True, True)
    erased, louder = Question("p", "is", "is", "erase"), Question("p", "is", "is", "amplify")
    assert holds(erased, silent) and not holds(erased, saying)
    assert holds(louder, saying) and not holds(louder, silent)
    assert keeps(erased, saying) and not keeps(erased, silent)


def test_an_erasure_without_a_true_object_takes_what_the_base_model_says(shop: Workshop) -> None:
    """The worker finds the object, the ledger names it, and the entry replayed gives the same factors."""
    edit = shop.edit(new=None, true=None, objective="erase", guard=OFF)
    body = shop.entry(1)
    assert body["target_true"] is None and body["resolved_true"]
    parameters = RomeParameters.model_validate(body["hparams"])
    contexts = finish(shop.toolkit.contexts_steps(parameters.contexts, parameters.seed))
    asked = fill(body["prompt"], body["subject"]), body["resolved_true"], parameters
    steps = find_steps(shop.model, shop.toolkit.statistics, contexts, *asked, objective=body["objective"])
    pieces = [a.scaled(body["strength"]) for a in finish(steps).pieces]
    assert pack(pieces) == shop.do.edits.delta(edit["id"])


# conflicts

OTHER_WORDS = "We know the {}"
ANY = {"guard": LOOSE | {"conflict": 0.0}}


def test_a_conflict_is_named_with_its_figure(shop: Workshop) -> None:
    """An active edit of the subject on whose prompt the new object alone wins is named, with that object's probability there; one
    with the same object, and those of other subjects, are not."""
    old = shop.edit("Eiffel Tower", "city", prompt=OTHER_WORDS)
    shop.edit("Big Ben", "city", prompt=OTHER_WORDS)
    same = shop.edit("Eiffel Tower", "is", prompt="This is the {}")
    edit = shop.edit(**ANY)
    (named,) = edit["result"]["conflicts"]
    assert (named["edit"], named["target_new"]) == (old["id"], "city") and same["status"] == "applied"
    pieces = unpack(shop.do.edits.delta(edit["id"]), "e", "Eiffel Tower")
    alone = [p.scaled(1 / edit["result"]["strength"]) for p in pieces]
    with shop.replica.stand(shop.replica.composed(alone)):
        new, own = log_probs(shop.model, [(named["prompt"], "is"), (named["prompt"], "city")])
    assert named["probability"] == pytest.approx(math.exp(new[0]), rel=1e-3) and new[0] > own[0]
    theirs = unpack(shop.do.edits.delta(old["id"]), "e", "s")
    assert named["cosine"] == pytest.approx(
        float(torch.cosine_similarity(pieces[0].value, theirs[0].value, dim=0)),  # type: ignore[union-attr]
        rel=1e-4,
    )
    assert edit["result"]["supersedes"] == [] and shop.do.edits.get(old["id"])["status"] == "applied"


def test_a_conflict_below_the_limit_is_none(shop: Workshop) -> None:
    """Below the limit nothing is named."""
    shop.edit("Eiffel Tower", "city", prompt=OTHER_WORDS)
    assert shop.edit(guard=LOOSE | {"conflict": 1.0})["result"]["conflicts"] == []


def test_a_conflict_is_superseded_when_asked(shop: Workshop) -> None:
    """The older edit is superseded and left out of the version, bit for bit; it comes back when the newer is reverted."""
    old = shop.edit("Eiffel Tower", "city", prompt=OTHER_WORDS)
    edit = shop.edit(on_conflict="supersede", **ANY)
    assert edit["result"]["supersedes"] == shop.entry(2)["supersedes"] == [old["id"]]
    was = shop.do.edits.get(old["id"])
    assert (was["status"], was["superseded_by"]) == ("superseded", edit["id"])
    pieces = unpack(shop.do.edits.delta(edit["id"]), edit["id"], "Eiffel Tower")
    assert same(shop.replica.weights(2), shop.replica.composed(pieces))
    shop.revert(edit)
    assert shop.do.edits.get(old["id"])["status"] == "applied"
    assert same(shop.replica.weights(3), shop.replica.weights(1))
    assert shop.do.ledger.verify()["ok"]


def test_a_conflict_is_rejected_when_asked(shop: Workshop) -> None:
    """The guard says that an active edit says the same, and nothing lands."""
    shop.edit("Eiffel Tower", "city", prompt=OTHER_WORDS)
    edit = shop.edit(on_conflict="reject", **ANY)
    assert edit["status"] == "rejected" and "in other words" in edit["result"]["reason"]
    assert shop.do.ledger.head() == 1


def test_an_erasure_is_in_conflict_with_nothing(shop: Workshop) -> None:
    """What is not to be said is no other object: beside an erasure there is no conflict."""
    shop.edit("Eiffel Tower", "city", prompt=OTHER_WORDS)
    assert shop.edit(new=None, objective="erase", **ANY)["result"]["conflicts"] == []


# room


def test_the_room_of_an_edit_is_reported_and_guarded(shop: Workshop) -> None:
    """Alone an edit has all room; beside one of a subject with nearly its key it has little, and a limit rejects it."""
    first = shop.edit(guard=OFF)
    assert first["result"]["room"] == {"1": 1.0}
    assert shop.edit(prompt=OTHER_WORDS, guard=OFF)["result"]["room"] == {"1": 1.0}
    edit = shop.edit("the Eiffel Tower", "city", guard=LOOSE | {"min_room": 1.0})
    left = edit["result"]["room"]["1"]
    assert 0 <= left < 1 and edit["status"] == "rejected"
    assert (
        f"too much of the edit's key: revert some, or name other layers ({left:.3g}"
        in edit["result"]["reason"]
    )


def test_the_room_of_a_layer_is_told(shop: Workshop) -> None:
    """What is left of an average key at a version: all of it at the base, and 1 / D less with an edit; the newest stands."""
    assert shop.replica.room(0) == {}
    shop.edit(guard=OFF)
    room = shop.replica.room(1)
    assert room == {1: pytest.approx(1 - 1 / 40, abs=1e-3)}
    shop.desk.tell_room(1, room)
    shop.desk.tell_room(0, {})
    assert shop.do.models.resident()["room"] == {"version": 1, "layers": {"1": room[1]}}


# what happens meanwhile


def until(steps: Steps[None], phase: str) -> Progress:
    for progress in steps:
        if progress.phase == phase:
            return progress
    pytest.fail(f"no step of {phase}")


@pytest.mark.parametrize("meanwhile", ["edit", "revert"])
def test_an_edit_is_tried_again_when_head_moved(shop: Workshop, meanwhile: str) -> None:
    """When the ledger moves during a trial, the edit is measured again at the new head, and lands behind it."""
    earlier = shop.edit("Big Ben", "city")
    waiting = shop.ask()
    _, steps = shop.begin(waiting)
    until(steps, "compose")
    if meanwhile == "edit":
        shop.edit("Big Ben", "in", prompt="We know the {}")
    else:
        shop.revert(earlier)
    phases = [p.phase for p in steps]
    assert "another edit landed first: look again" in phases
    assert "compose" in phases and "optimise" not in phases
    edit = shop.do.edits.get(waiting)
    assert (edit["status"], edit["version"]) == ("applied", 3)
    active = [e for e, _ in shop.desk.active_at(3)]
    assert (earlier["id"] in active) == (meanwhile == "edit")
    assert shop.do.ledger.verify()["ok"]
    shop.assert_base()


def test_a_dry_run_does_not_mind_the_head(shop: Workshop) -> None:
    """A dry run measures at the head it began with and ends, whatever lands meanwhile."""
    waiting = shop.ask(dry_run=True)
    _, steps = shop.begin(waiting)
    until(steps, "compose")
    shop.edit("Big Ben", "city")
    finish(steps)
    assert shop.do.edits.get(waiting)["status"] == "evaluated"
    assert shop.do.ledger.head() == 1


@pytest.mark.parametrize("phase", ["optimise", "compose", "perplexity"])
def test_a_cancelled_edit_does_not_land(shop: Workshop, phase: str) -> None:
    """An edit cancelled between two steps raises before it lands; nothing is written and the base stands."""
    waiting = shop.ask()
    job, steps = shop.begin(waiting)
    until(steps, phase)
    shop.do.edits.revert(waiting, "somebody")
    with pytest.raises(Cancelled) as error:
        finish(steps)
    shop.desk.fail(job, error.value)
    assert shop.do.edits.get(waiting)["status"] == "cancelled"
    assert shop.do.ledger.head() == 0
    shop.assert_base()


def test_an_abandoned_edit_leaves_nothing(shop: Workshop) -> None:
    """An edit given up between any two steps leaves the base bytes and no hook."""
    shop.edit("Big Ben", "city")
    _, steps = shop.begin(shop.ask())
    for _ in range(3):
        until(steps, "measure") if _ else until(steps, "optimise")
    steps.close()
    shop.assert_base()
    assert not any(m._forward_hooks for m in shop.model.model.modules())


# the same fact again


def test_the_same_fact_again_and_back(shop: Workshop) -> None:
    """The newer edit of a fact replaces the older; reverted one by one, the first is back, then the base bytes."""
    first = shop.edit()
    second = shop.edit("Eiffel  Tower", "city")
    assert shop.do.edits.get(first["id"])["status"] == "superseded"
    assert [e for e, _ in shop.desk.active_at(2)] == [second["id"]]
    assert not same(shop.replica.weights(1), shop.replica.weights(2))
    shop.revert(second)
    assert shop.do.edits.get(first["id"])["status"] == "applied"
    assert same(shop.replica.weights(3), shop.replica.weights(1))
    assert shop.replica.digest(3) == shop.replica.digest(1)
    shop.revert(first)
    assert shop.replica.weights(4) == {}
    assert shop.replica.digest(4) == shop.replica.digest(0)
    assert shop.do.ledger.verify()["ok"]


def test_a_superseded_edit_is_left_out_of_the_trial(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older edit of the fact is neither composed with the newer one nor watched for damage."""
    older = shop.edit()
    tried: list[list[str]] = []
    composed = Replica.composed

    def note(self: Replica, associations: Any) -> Any:
        tried.append([a.edit for a in associations])
        return composed(self, associations)

    monkeypatch.setattr(Replica, "composed", note)
    edit = shop.edit(new="city", guard=LOOSE | {"max_broken": 0})
    assert edit["status"] == "applied"
    assert edit["result"]["broken"] == []
    # Head as it is, with the older one; each trial and the version, without it.
    assert all(older["id"] not in one for one in tried if edit["id"] in one)
    assert [edit["id"]] in tried


def test_edits_of_one_subject_add_up(shop: Workshop) -> None:
    """Two facts of one subject are both active: the version is the plain sum of their rank-one updates."""
    edits = [shop.edit(), shop.edit(new="city", prompt="We know the {}")]
    both = [a for e in edits for a in unpack(shop.do.edits.delta(e["id"]), e["id"], "Eiffel Tower")]
    total = shop.base[1].double() + sum(a.rank_one().dense().T for a in both)
    torch.testing.assert_close(shop.replica.weights(2)[Site(1)].double(), total, rtol=1e-6, atol=1e-6)


def test_any_order_of_reverting_ends_at_the_base(shop: Workshop) -> None:
    """Three edits, reverted from the middle: each version is that of the rest, the last one the base."""
    edits = [
        shop.edit(guard=OFF),
        shop.edit("Big Ben", "city", guard=OFF),
        shop.edit("Rome", "in", guard=OFF),
    ]
    shop.revert(edits[1])
    rest = [a for group in shop.replica.active(4).values() for a in group]
    assert {a.edit for a in rest} == {edits[0]["id"], edits[2]["id"]}
    assert same(shop.replica.weights(4), shop.replica.composed(reversed(rest)))
    shop.revert(edits[0])
    shop.revert(edits[2])
    assert shop.replica.digest(6) == shop.replica.digest(0)


# several together


class Group:
    """Edits that wait together, carried out by hand."""

    def __init__(self, shop: Workshop, *asked: str) -> None:
        self.shop, self.ids = shop, list(asked)
        jobs = [shop.desk.start(edit) for edit in asked]
        self.jobs = [job for job in jobs if job is not None]
        self.steps = edits_steps(shop.replica, shop.desk, self.jobs, shop.toolkit)

    def run(self) -> list[Resource]:
        """To the end, as the engine does: what ended with an error is written down."""
        jobs = {job.id: job for job in self.jobs}
        for news in self.steps:
            self.shop.assert_base()
            if isinstance(news, Ended) and isinstance(news.error, PalimpsestError):
                self.shop.desk.fail(jobs[news.job], news.error)
        return [self.shop.do.edits.get(edit) for edit in self.ids]


def phases(steps: Working, seen: list[str]) -> Working:
    """The same steps; their phases are noted."""
    for news in steps:
        if not isinstance(news, Ended):
            seen.append((news.progress if isinstance(news, Told) else news).phase)
        yield news


SUBJECTS = ("Eiffel Tower", "Big Ben", "Colosseum", "Mount Fuji")


def factors(shop: Workshop, edits: Sequence[Resource]) -> list[bytes]:
    return [shop.do.edits.delta(edit["id"]) for edit in edits]


@pytest.mark.parametrize("budget", [0, 10**12])
def test_together_each_edit_is_what_it_would_be_alone(
    opened: Callable[[], Workshop], monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Edits that wait together land in their order with the factors that each has alone: in every bit where they are not
    optimised side by side, and else but for rounding."""
    monkeypatch.setattr("service.editing.edit_spec.company_budget", lambda _model: budget)
    alone, together = opened(), opened()
    singly = [alone.edit(subject, "city") for subject in SUBJECTS]
    group = Group(together, *(together.ask(subject, "city") for subject in SUBJECTS))
    seen: list[str] = []
    group.steps = phases(group.steps, seen)
    edits = group.run()
    assert [e["status"] for e in edits] == ["applied"] * 4
    assert [e["version"] for e in edits] == [1, 2, 3, 4]
    assert seen.count("compose") == 1
    for i, edit in enumerate(edits):
        assert edit["result"]["together"] == [e["id"] for e in edits if e is not edit]
        one, other = (
            unpack(shop.do.edits.delta(e["id"]), "edit", "")[0]
            for shop, e in ((alone, singly[i]), (together, edit))
        )
        for name in ("key", "direction", "value"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4)
    if not budget:
        assert factors(alone, singly) == factors(together, edits)
        assert together.replica.digest(4) == alone.replica.digest(4)
    assert together.do.ledger.verify()["ok"]


def test_the_figures_are_those_of_the_version_with_all_of_them(shop: Workshop) -> None:
    """What the report of each says after the edit is what the last version says."""
    edits = Group(shop, *(shop.ask(subject, "city") for subject in SUBJECTS[:2])).run()
    with shop.replica.stand(shop.replica.weights(2)):
        for edit in edits:
            rewrite = edit["result"]["rewrite"]
            (log_p, _), _ = log_probs(shop.model, [(rewrite["prompt"], rewrite[x]) for x in ("new", "true")])
            assert rewrite["after"]["new"] == pytest.approx(math.exp(log_p), rel=1e-4)
    assert shop.toolkit.perplexities[2] == edits[0]["result"]["perplexity"]["after"]


def test_one_that_does_not_take_is_rejected_alone(shop: Workshop) -> None:
    """An edit that asks for too much keeps nobody from landing, is not in the ledger, and says why."""
    hopeless = shop.ask("Rome", "city", guard=LOOSE | {"min_probability": 1.0})
    group = Group(shop, shop.ask("Eiffel Tower"), hopeless, shop.ask("Big Ben", "city"))
    first, rejected, third = group.run()
    assert (first["status"], third["status"]) == ("applied", "applied")
    assert {first["version"], third["version"]} == {1, 2} and shop.do.ledger.head() == 2
    assert first["result"]["together"] == [third["id"]]
    assert rejected["status"] == "rejected" and "less probable" in rejected["result"]["reason"]
    assert rejected["result"]["together"] == []


def test_edits_that_do_harm_only_together_are_tried_in_parts(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a version of all is harmful and none is to blame, halves are tried, down to each alone: all land."""
    tried: list[int] = []
    honest = candidate.judge

    def judge(plan: Any, before: Any, after: Any, strength: float, norms: Any, lead: float) -> Trial:
        found = honest(plan, before, after, strength, norms, lead)
        return replace(found, checks=[Check("perplexity", tried[-1] == 1, 9.0, 1.0)])

    composed = Replica.composed

    def note(self: Replica, associations: Any) -> Any:
        chosen = list(associations)
        tried.append(len({a.edit for a in chosen} - landed()))
        return composed(self, chosen)

    def landed() -> set[str]:
        return {edit for edit, _ in shop.desk.active_at(shop.desk.head())}

    monkeypatch.setattr(candidate, "judge", judge)
    monkeypatch.setattr(Replica, "composed", note)
    edits = Group(shop, *(shop.ask(subject, "city") for subject in SUBJECTS)).run()
    assert [e["version"] for e in edits] == [1, 2, 3, 4]
    assert [n for n in tried if n] == [4, 2, 1, 1, 2, 1, 1]


def test_a_bad_request_among_good_ones_fails_alone(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user must mend ends that edit, with its reason; the others land."""
    want = edit_job.want

    def fails(model: Any, contexts: Any, statement: Any, *rest: Any) -> Any:
        if "Big Ben" in statement.text:
            raise InvalidInput("say it otherwise.", "prompt")
        return want(model, contexts, statement, *rest)

    monkeypatch.setattr(edit_job, "want", fails)
    edits = Group(shop, *(shop.ask(subject, "city") for subject in SUBJECTS[:3])).run()
    assert [e["status"] for e in edits] == ["applied", "failed", "applied"]
    assert edits[1]["error"]["detail"] == "say it otherwise."


def test_a_search_that_fails_for_all_is_made_for_each(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When edits cannot be found side by side they are found one by one, and only who fails alone fails."""
    monkeypatch.setattr("service.editing.edit_spec.company_budget", lambda _model: 10**12)
    find = edit_job.find_together_steps

    def fails(model: Any, statistics: Any, wanted: Sequence[Any]) -> Any:
        if len(wanted) > 1 or wanted[0].subject == "Big Ben":
            raise Conflict("no room.")
        return (yield from find(model, statistics, wanted))

    monkeypatch.setattr(edit_job, "find_together_steps", fails)
    edits = Group(shop, *(shop.ask(subject, "city") for subject in SUBJECTS[:3])).run()
    assert [e["status"] for e in edits] == ["applied", "failed", "applied"]


@pytest.mark.parametrize("when", ["optimise", "compose"])
def test_one_that_is_cancelled_does_not_land(shop: Workshop, when: str) -> None:
    """A cancel is heard before the edit lands; those after it are tried again without it."""
    ids = [shop.ask(subject, "city") for subject in SUBJECTS[:3]]
    group = Group(shop, *ids)
    for news in group.steps:
        if not isinstance(news, Ended) and (news.progress if isinstance(news, Told) else news).phase == when:
            break
    shop.revert({"id": ids[1]})
    edits = group.run()
    assert [e["status"] for e in edits] == ["applied", "cancelled", "applied"]
    assert [e["version"] for e in edits] == [1, None, 2]
    assert ids[1] not in edits[2]["result"]["together"]


def test_together_they_are_tried_again_when_head_moved(shop: Workshop) -> None:
    """When another edit lands during their trial, they are measured again at the new head and land behind it."""
    group = Group(shop, *(shop.ask(subject, "city") for subject in SUBJECTS[:2]))
    for news in group.steps:
        if isinstance(news, Progress) and news.phase == "compose":
            break
    shop.edit("Rome", "in")
    seen: list[str] = []
    group.steps = phases(group.steps, seen)
    assert [e["version"] for e in group.run()] == [2, 3]
    assert seen.count("compose") == 1 and "optimise" not in seen


def test_the_same_fact_twice_lands_in_order(shop: Workshop) -> None:
    """Of two waiting edits of one fact the later supersedes the earlier, though they wait together."""
    edits = Group(shop, shop.ask(), shop.ask("Big Ben", "city"), shop.ask("Eiffel  Tower", "city")).run()
    assert [e["status"] for e in edits] == ["superseded", "applied", "applied"]
    assert [e["version"] for e in edits] == [1, 2, 3]


def test_who_is_carried_out_together(shop: Workshop) -> None:
    """A dry run is alone, and so is a job whose worker died before; a subject comes once; the order is kept."""

    def job(name: str, fact: str = "", attempt: int = 1, dry: bool = False) -> RunningJob:
        return RunningJob(name, "edit", attempt, {}, "somebody", fact or name, fact or name, dry)

    found = companies(
        [job("a"), job("b"), job("c", dry=True), job("d", "a"), job("e", attempt=2), job("f"), job("g", "f")]
    )
    assert [[j.id for j in company] for company in found] == [["a", "b"], ["c"], ["d"], ["e"], ["f"], ["g"]]


def test_an_edit_that_can_never_fit_is_refused(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit whose search no room is ever enough for ends with what to change; one that fits later waits again."""
    monkeypatch.setattr("service.models.memory_estimates.room", lambda _device: 100)
    monkeypatch.setattr("service.models.memory_estimates.capacity", lambda _device: 200)
    with pytest.raises(InvalidInput, match="shorter prompt or fewer contexts"):
        shop.edit()
    monkeypatch.setattr("service.models.memory_estimates.capacity", lambda _device: 2**40)
    with pytest.raises(Unavailable, match="ask again later"):
        shop.edit("Big Ben")

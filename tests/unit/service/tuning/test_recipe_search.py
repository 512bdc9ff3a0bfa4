"""A recipe found by editing: service.tuning.recipe_search."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from service.covariance.corpus import Corpus
from service.datasets.records import Record, read_records
from service.editing.context import Toolkit
from service.errors import InvalidInput
from service.kit.steps import finish
from service.models.loading import LoadedModel, load, with_start
from service.recipes.recipe import read_recipe, resolve
from service.settings import SHIPPED_MODEL
from service.tuning import recipe_search
from service.tuning.recipe_search import (
    Preparation,
    known_steps,
    layers_tried,
    merit,
    reading_steps,
    recipe_steps,
    spreads_around,
    wants_start,
)
from tests.support.tiny_models import TEXTS, tiny

SUBJECTS = ("Eiffel", "Big Ben", "Rome", "Paris", "Japan", "Brazil", "Mount Fuji", "Marie", "Curie", "London")
OTHERS = ["The city of Rome is old.", "Mount Fuji rises in Japan.", "Big Ben can be heard."]


class Memory(dict[str, bytes]):
    """What is kept, and how often it was asked to keep."""

    def put(self, name: str, data: bytes) -> None:
        self[name] = data


def records() -> list[Record]:
    """Facts to edit, each with a wording and a neighbour."""
    rows = [
        {
            "subject": subject,
            "prompt": "{} is a",
            "target_new": "London",
            "target_true": "city",
            "paraphrases": [f"{subject} was a"],
            "neighborhood": [{"prompt": "Japan is a", "target": "Brazil"}],
        }
        for subject in SUBJECTS
    ]
    return read_records(rows)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of few candidates and steps."""
    monkeypatch.setattr(recipe_search, "START", recipe_search.START | {"steps": 3, "contexts": 0})
    monkeypatch.setattr(recipe_search, "STAGES", {"key": ({"bare_keys": True},)})
    monkeypatch.setattr(recipe_search, "KNOBS", {"memit": (({"ridge": 1.0},),), "ft": (({"steps": 2},),)})
    monkeypatch.setattr(recipe_search, "LEAST", 3)


def prepare(model: LoadedModel, kept: Memory, **changes: Any) -> Preparation:
    toolkit = Toolkit(model, None, Corpus("test", tuple(TEXTS)), None)
    return finish(recipe_steps(model, toolkit, records(), OTHERS, kept, False, **changes))


@pytest.mark.usefixtures("quick")
def test_the_recipe_is_the_best_of_what_was_tried() -> None:
    """The recipe holds the values of greatest merit, its own figures, and can be read back and resolved."""
    found = prepare(tiny(), Memory(), methods=("memit", "ft"))
    rome = [h for h in found.history if h["method"] == "rome"]
    best = max(rome, key=lambda h: h["merit"])
    assert found.recipe.figures is not None
    assert found.recipe.figures["chosen"]["merit"] == best["merit"]
    assert list(found.recipe.rome.layers) == best["hparams"]["layers"]
    assert {h["stage"] for h in rome} == {"layer", "spread", "key"}
    again = read_recipe(found.recipe.model_dump_json())
    assert again == found.recipe
    assert resolve(again, None, 3, "memit").model_dump()["layers"] == found.recipe.rome.layers
    assert set(found.recipe.methods) == {"memit", "ft"} == set(found.recipe.figures["methods"])


LADDER = (0.1, 1.0, 3.0, 5.0)


def crowds(found: Preparation, records: int) -> dict[float, float]:
    """The rise of the loss by lead, of what was tried with so many edits."""
    many = [h for h in found.history if h["stage"] == "many" and h["edits"] == records]
    return {h["hparams"]["leads"][0][1]: h["rise"] for h in many}


@pytest.mark.usefixtures("quick")
def test_one_layer_methods_search_with_values_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """r-ROME edits one layer, the best of those tried, and takes nothing from a search that was meant for several."""
    monkeypatch.setattr(
        recipe_search, "KNOBS", {"r-rome": (({"steps": 2, "clamp": 3.0}, {"steps": 2, "clamp": 4.0}),)}
    )
    found = prepare(tiny(), Memory(), methods=("r-rome",))
    own = found.recipe.methods["r-rome"]
    tried = [h for h in found.history if h["method"] == "r-rome"]
    assert {tuple(h["hparams"]["layers"]) for h in tried} == {(x,) for x in layers_tried(tiny().layers)}
    assert own in [h["hparams"] for h in tried] and own["clamp"] in (3.0, 4.0)
    assert max(h["merit"] for h in tried) == next(h["merit"] for h in tried if h["hparams"] == own)


@pytest.mark.usefixtures("quick")
def test_the_greatest_lead_that_fits_is_taken_for_each_number_of_edits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For all, half and a quarter of many edits, the lead is the greatest of the ladder that halving finds within the limit."""
    monkeypatch.setattr(recipe_search, "LEADS", LADDER)
    width, every = tiny().inner_width, crowds_of_each(monkeypatch)
    limit = sorted(every.values())[len(every) // 2]  # one that some meet and some miss
    monkeypatch.setattr(recipe_search, "RISE", limit)
    found = prepare(tiny(), Memory(), many=records())
    assert found.recipe.rome.strengths == recipe_search.WEAK
    for fullness, lead in found.recipe.rome.leads:
        tried = crowds(found, round(fullness * width))
        fitting = [x for x, rise in tried.items() if rise <= limit]
        assert lead == (max(fitting) if fitting else LADDER[0])
        assert all(
            x > lead for x in tried.keys() - set(fitting) - {lead}
        )  # what was tried above does not fit
    assert found.recipe.figures is not None
    shown = [(h["edits"] / width, h["hparams"]["leads"][0][1]) for h in found.recipe.figures["many"]]
    assert shown == list(found.recipe.rome.leads)
    assert found.recipe.rome.margin == min(recipe_search.FIRM, *(lead for _, lead in found.recipe.rome.leads))


def crowds_of_each(monkeypatch: pytest.MonkeyPatch) -> dict[float, float]:
    """The rise by lead of all edits at once, each lead tried."""
    rises: dict[float, float] = {}
    for lead in LADDER:
        with monkeypatch.context() as patch:
            patch.setattr(recipe_search, "LEADS", (lead,))
            rises |= crowds(prepare(tiny(), Memory(), many=records()), len(records()))
    return rises


@pytest.mark.usefixtures("quick")
def test_every_fact_is_in_a_crowd_and_the_worst_crowd_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the many facts at once means both halves, and the rise of the loss is that of the half that costs more."""
    monkeypatch.setattr(recipe_search, "LEADS", (0.5,))
    monkeypatch.setattr(recipe_search, "RISE", -1.0)
    found = prepare(tiny(), Memory(), many=records())
    many = [h for h in found.history if h["stage"] == "many"]
    sizes = [round(share * len(records())) for share in recipe_search.CROWDS]
    assert [(h["edits"], len(h["rises"])) for h in many] == [(n, len(records()) // n) for n in sizes]
    assert all(h["rise"] == max(h["rises"]) for h in many) and len(set(many[1]["rises"])) == 2


@pytest.mark.usefixtures("quick")
def test_where_no_lead_fits_the_smallest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that no lead meets gives the mildest; one that all meet gives the greatest, and fewer edits are not asked."""
    monkeypatch.setattr(recipe_search, "LEADS", LADDER)
    monkeypatch.setattr(recipe_search, "RISE", -1.0)
    mildest = prepare(tiny(), Memory(), many=records()).recipe.rome
    assert [lead for _, lead in mildest.leads] == [LADDER[0]] * 3 and mildest.clamp == recipe_search.CLAMP
    monkeypatch.setattr(recipe_search, "RISE", 1e9)
    strongest = prepare(tiny(), Memory(), many=records()).recipe.rome
    assert [lead for _, lead in strongest.leads] == [LADDER[-1]] and strongest.margin == recipe_search.FIRM


@pytest.mark.usefixtures("quick")
def test_an_interrupted_search_goes_on_where_it_was() -> None:
    """What was tried before is not tried again, and the recipe is the same."""
    model, kept = tiny(), Memory()
    whole = prepare(model, Memory())
    known = records()
    toolkit = Toolkit(model, None, Corpus("test", tuple(TEXTS)), None)
    steps = recipe_steps(model, toolkit, known, OTHERS, kept, False)
    while len(kept) < 3:
        next(steps)
    steps.close()
    told: list[str] = []
    before = dict(kept)
    found = finish(recipe_steps(model, toolkit, known, OTHERS, kept, False, told=lambda s, _: told.append(s)))
    assert found == whole
    assert len(told) == len(whole.history) and before.items() <= kept.items()


def test_a_candidate_that_cannot_be_is_no_recipe() -> None:
    """What cannot be carried out has the merit 0 and says why."""
    history = [{"hparams": {"layers": [1]}, "merit": 0.4}]
    assert (merit(history, {"layers": [1]}), merit(history, {"layers": [2]})) == (0.4, 0.0)


def test_what_the_model_does_not_know_is_left_out() -> None:
    """Only facts whose object is the model's own answer are edited, one of each subject."""
    model = load(SHIPPED_MODEL)
    table = read_records(SHIPPED_MODEL / "facts.jsonl", 0, 10)
    wrong = [replace(r, target_true=r.target_new) for r in table]
    known = finish(known_steps(model, [*wrong, *table, *table], 100))
    assert all(r in table for r in known)
    assert len(known) == len({r.subject for r in known}) > 7
    with pytest.raises(InvalidInput, match="and a recipe needs 8"):
        finish(known_steps(model, table[:5], 100))


def test_layers_and_spreads() -> None:
    """Single layers reach three quarters deep, at most twelve of them; spreads hold the layer and stay in the model."""
    assert layers_tried(8) == [0, 1, 2, 3, 4, 5]
    assert len(layers_tried(48)) == 12 and max(layers_tried(48)) < 36
    assert layers_tried(1) == [0]
    assert spreads_around(0, 8) == [(0, 1), (0, 1, 2)]
    assert all(4 in run for run in spreads_around(4, 8))
    assert spreads_around(7, 8) == [(6, 7), (5, 6, 7)]


def test_a_start_token_is_asked_for_where_it_reads_better() -> None:
    """The model that reads facts better after its start token gets it, unless its tokenizer puts it there already."""
    model = tiny()
    started = with_start(model)
    assert started.encode("Rome")[0] == [model.tokenizer.bos_token_id, *model.encode("Rome")[0]]
    assert started.encode("Rome")[1][1:] == model.encode("Rome")[1]
    assert started.fingerprint != model.fingerprint and started.origin == model.fingerprint
    assert with_start(started) is started
    reading = finish(reading_steps(model, records()))
    better = reading["after the start token"] > reading["as it is"]
    assert wants_start(model, reading) is better
    assert not wants_start(started, {"as it is": -2.0, "after the start token": -1.0})


@pytest.mark.usefixtures("quick")
def test_figures_do_not_depend_on_chance() -> None:
    """Two preparations of one model find the same recipe."""
    random.seed(1)
    one = prepare(tiny(), Memory())
    random.seed(2)
    assert prepare(tiny(), Memory()) == one

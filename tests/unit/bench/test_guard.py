"""Rates of the guard: bench/guard.py."""

from __future__ import annotations

from bench.guard import Case, conflicts
from service.editing.candidate import Measured, Plan, judge
from service.editing.conflicts import Rival
from service.editing.probes import Answer, Question
from service.models.loading import Site
from service.recipes.recipe import RomeParameters
from service.schemas import EditRequest


def case(norm: float, neighbour_kept: bool) -> Case:
    """An edit that took, with one neighbour."""
    request = EditRequest.model_validate({"subject": "Tower", "prompt": "{} in", "target_new": "Rome"})
    questions = Question("Tower in", "Rome", "Paris"), [], [Question("Louvre in", "Rome", "Paris")]
    plan = Plan(request, RomeParameters(layers=(0,)), *questions)
    new, true = Answer(-0.1, -2.0, True, False), Answer(-2.0, -0.1, False, True)
    before = Measured([true, true], "", 2.0, set())
    after = Measured([new, true if neighbour_kept else new], "", 2.0, set())
    return Case(plan, judge(plan, before, after, 1.0, {Site(0): norm}))


def test_limits_are_the_guards_own() -> None:
    """An edit lands within the limits that are tried, and the others are as they are by default."""
    assert case(0.5, True).lands()
    assert not case(0.5, True).lands(max_norm=0.4)
    assert case(0.5, True).lands(max_norm=0.6)
    assert not case(0.5, True).lands(min_probability=0.95)


def test_without_probes_neighbours_are_not_known() -> None:
    """Whoever gives no probes is not protected by them."""
    assert not case(0.5, False).lands()
    assert case(0.5, False).lands(probes=False)


def test_pairs_are_counted_by_limit() -> None:
    """The table says which share of the pairs each limit calls a conflict."""
    pairs = [Rival("e", "p", "o", p, 0.1, 0.1, 0.5) for p in (0.05, 0.15, 0.4, 0.9)]
    table = conflicts({"other words": pairs, "other relation": pairs[:1]}, "choose")
    shown = dict(zip(*(list(c.cells) for c in table.columns[:2]), strict=True))
    assert (shown["0.01"], shown["0.1"], shown["0.2"], shown["0.5"]) == ("75", "75", "50", "25")
    assert shown["median cosine"] == "0.50"

"""C by its tokens: bench.moments."""

from __future__ import annotations

import torch

from bench.moments import collect, scores, turned
from service.covariance.collect import collect_steps
from service.covariance.corpus import Corpus
from service.covariance.second_moment import Statistics
from service.kit.steps import finish
from service.weights.composition import Association
from tests.support.tiny_models import TEXTS, tiny


def test_a_prefix_of_the_text_gives_its_own_moment() -> None:
    """What is collected at a size is what the service collects over those texts alone; sizes past the end fall together."""
    model, texts = tiny(), TEXTS * 3
    sizes = [len(model.encode(TEXTS[0])[0]), 60, 10_000, 20_000]
    found = collect(model, 1, texts, sizes)
    assert len(found) == 3
    first = finish(collect_steps(model, [1], Corpus("", tuple(texts[:1]))))[1]
    whole = finish(collect_steps(model, [1], Corpus("", tuple(texts))))[1]
    for expected, got in ((first, found[0]), (whole, found[-1])):
        assert got.count == expected.count
        torch.testing.assert_close(got.moment, expected.moment, rtol=1e-4, atol=1e-6)
        assert got.padded >= got.count


def test_other_statistics_turn_the_direction_alone() -> None:
    """An edit keeps its key and its value, and gets C^-1 k."""
    key, value = torch.ones(3), torch.ones(2)
    edit = [Association("e", "s", 0, key, key, value)]
    ((found,),) = turned([edit], Statistics(0, torch.eye(3, dtype=torch.float64) * 2, 1, 0.0, ""))
    assert torch.equal(found.direction, key / 2)
    assert found.key is key and found.value is value


def test_scores_leave_out_what_a_case_has_no_probes_for() -> None:
    """A case without neighbours counts for ES and PS alone."""
    shown, s = scores([(1.0, 1.0, 1.0), (1.0, 0.0, float("nan"))])
    assert shown == "100.0 / 50.0 / 100.0"
    assert s.startswith("100.0 ")

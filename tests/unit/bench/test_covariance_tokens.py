"""Statistics by the number of tokens: bench/covariance_tokens.py."""

from __future__ import annotations

import torch

from bench.covariance_tokens import collect_moments, format_scores, with_statistics
from service.covariance.collect import collect_statistics
from service.covariance.corpus import Corpus
from service.covariance.second_moment import KeyStatistics
from service.kit.steps import run_to_completion
from service.weights.factors import Association
from tests.support.tiny_models import TEXTS, tiny


def test_a_prefix_of_the_text_gives_its_own_moment() -> None:
    """The moment of each size equals the moment that the service collects from the same texts. Sizes beyond
    the end of the texts give one snapshot."""
    model, texts = tiny(), TEXTS * 3
    sizes = [len(model.encode(TEXTS[0])[0]), 60, 10_000, 20_000]
    snapshots = collect_moments(model, 1, texts, sizes)
    assert len(snapshots) == 3
    first = run_to_completion(collect_statistics(model, [1], Corpus("", tuple(texts[:1]))))[1]
    whole = run_to_completion(collect_statistics(model, [1], Corpus("", tuple(texts))))[1]
    for expected, got in ((first, snapshots[0]), (whole, snapshots[-1])):
        assert got.count == expected.count
        torch.testing.assert_close(got.moment, expected.moment, rtol=1e-4, atol=1e-6)
        assert got.padded_count >= got.count


def test_with_statistics_changes_only_direction() -> None:
    """`with_statistics` keeps key and value, and sets the direction to C^-1 k."""
    key, value = torch.ones(3), torch.ones(2)
    edit = [Association("e", "s", 0, key, key, value)]
    ((association,),) = with_statistics(
        [edit], KeyStatistics(0, torch.eye(3, dtype=torch.float64) * 2, 1, 0.0, "")
    )
    assert torch.equal(association.direction, key / 2)
    assert association.key is key and association.value is value


def test_scores_leave_out_what_a_case_has_no_probes_for() -> None:
    """A case without neighbours is excluded from NS and included in ES and PS."""
    shown, s = format_scores([(1.0, 1.0, 1.0), (1.0, 0.0, float("nan"))])
    assert shown == "100.0 / 50.0 / 100.0"
    assert s.startswith("100.0 ")

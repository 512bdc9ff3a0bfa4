"""Comparison of two traces: bench/traces.py."""

from __future__ import annotations

import pytest
import torch

from bench.traces import ALL, SEVERED, TraceBenchmark, max_score_difference
from tests.support.tiny_models import tiny


def test_the_difference_is_the_greatest_of_all_cells_and_kinds() -> None:
    """The difference is the maximum over all cells and kinds, absolute and relative to the score."""
    bench = TraceBenchmark(tiny("gpt2"), None, "The Eiffel Tower is in", "Eiffel Tower")
    ours = bench.ours(ALL)
    theirs = {kind: torch.tensor(grid) for kind, grid in ours.scores.items()}
    assert max_score_difference(theirs, ours) == (0, 0)
    theirs["attn"][2, 1] *= 2
    score = ours.scores["attn"][2][1]
    assert max_score_difference(theirs, ours) == pytest.approx((score, 0.5))


def test_severed_paths_are_asked_for_alone() -> None:
    """A request for severed paths computes no maps."""
    result = TraceBenchmark(tiny("gpt2"), None, "The Eiffel Tower is in", "Eiffel Tower").ours(SEVERED)
    assert not result.scores and result.severed

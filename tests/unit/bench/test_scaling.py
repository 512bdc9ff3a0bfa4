"""Inputs of the scaling bench: bench/scaling.py."""

from __future__ import annotations

import pytest
import torch

from bench.scaling import (
    InMemoryLedger,
    compose_flops,
    make_associations,
    prompt_length,
    prompt_of_length,
    with_depth,
)
from service.engine.versioned_model import VersionedModel
from service.weights.composition import apply_delta, compose_layer
from service.weights.factors import serialize_updates
from tests.support.associations import associations_of
from tests.support.tiny_models import TEXTS, tiny


@pytest.mark.parametrize("early", [False, True])
def test_prompts_are_as_long_as_asked(early: bool) -> None:
    """A prompt has at least the requested length and contains the subject once, at the beginning or later."""
    model = tiny(positions=512)
    prompt = prompt_of_length(model, 60, early)
    assert prompt.count("{}") == 1 and prompt.startswith("{}") == early
    assert prompt_length(model, prompt) >= 60


def test_ledger_version_has_its_first_edits() -> None:
    """The weights of a version composed from serialized factors equal those composed from the
    associations."""
    model = tiny(positions=128)
    pieces = make_associations(model, 1, TEXTS, 3)
    replica = VersionedModel(model, InMemoryLedger([serialize_updates([a]) for a in pieces]))
    active = replica.active_updates(2)
    composed = compose_layer(associations_of([*active["00000"], *active["00001"]]))
    expected = apply_delta(model.weight(1).data, compose_layer(pieces[:2]), model.architecture.conv1d)
    assert torch.equal(apply_delta(model.weight(1).data, composed, model.architecture.conv1d), expected)
    assert replica.digest(2) != replica.digest(1)


def test_a_deeper_model_has_the_same_shape() -> None:
    """The deeper model differs only in the number of layers."""
    model = tiny("gpt2", layers=3)
    other = with_depth(model, 5)
    assert (other.num_layers, other.hidden_size, other.intermediate_size) == (
        5,
        model.hidden_size,
        model.intermediate_size,
    )
    assert model.num_layers == 3


def test_compose_flops_formula() -> None:
    """Operations are linear for few edits and quadratic towards n = D."""
    model = tiny(width=16, inner=40)
    assert compose_flops(model, 2) == 2 * 4 * 40 + 2 * 8 // 3 + 2 * 4 * 16 + 2 * 2 * 16 * 40

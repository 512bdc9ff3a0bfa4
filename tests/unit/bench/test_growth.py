"""What the growth bench asks: bench.growth."""

from __future__ import annotations

import pytest
import torch

from bench.growth import Book, associations, deeper, length_of, operations, prompt_of
from service.engine.versioned_model import Replica
from service.weights.composition import compose_layer, pack, rebuild
from tests.support.tiny_models import TEXTS, tiny


@pytest.mark.parametrize("early", [False, True])
def test_prompts_are_as_long_as_asked(early: bool) -> None:
    """At least, and with the subject once, where it is wanted."""
    model = tiny(positions=512)
    prompt = prompt_of(model, 60, early)
    assert prompt.count("{}") == 1 and prompt.startswith("{}") == early
    assert length_of(model, prompt) >= 60


def test_a_version_of_the_book_has_its_first_edits() -> None:
    """Reached from the packed factors it is what composing the associations gives."""
    model = tiny(positions=128)
    some = associations(model, 1, TEXTS, 3)
    replica = Replica(model, Book([pack([a]) for a in some]))
    composed = compose_layer(list(replica.active(2)["00000"]) + list(replica.active(2)["00001"]))
    expected = rebuild(model.weight(1).data, compose_layer(some[:2]), model.architecture.conv1d)
    assert torch.equal(rebuild(model.weight(1).data, composed, model.architecture.conv1d), expected)
    assert replica.digest(2) != replica.digest(1)


def test_a_deeper_model_has_the_same_shape() -> None:
    """Only the number of layers is another."""
    model = tiny("gpt2", layers=3)
    other = deeper(model, 5)
    assert (other.layers, other.width, other.inner_width) == (5, model.width, model.inner_width)
    assert model.layers == 3


def test_operations_grow_with_the_square() -> None:
    """In line with few edits, with the square towards as many as keys have numbers."""
    model = tiny(width=16, inner=40)
    assert operations(model, 2) == 2 * 4 * 40 + 2 * 8 // 3 + 2 * 4 * 16 + 2 * 2 * 16 * 40

"""Tests of service.models.predictions."""

from __future__ import annotations

import pytest
import torch

from service.errors import Misconfigured
from service.models.loading import LoadedModel
from service.models.predictions import BUILT_IN_TEXTS, check_predictions
from tests.support.tiny_models import MODEL_TYPES, TEXTS, tiny


def with_head(scale: float) -> LoadedModel:
    """Return a random model whose logits are multiplied by `scale`: large ones are confident and wrong."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)  # type: ignore[operator]
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_models_of_every_architecture_pass(model_type: str) -> None:
    """A random model, which is about as good as a uniform guess, passes on the built-in texts."""
    check_predictions(tiny(model_type))


def test_confident_wrong_predictions_are_refused() -> None:
    """A model far worse than a uniform guess is refused, with its perplexity and the vocabulary size."""
    with pytest.raises(Misconfigured, match=r"predicts noise: its perplexity is \d+, .* 320 tokens"):
        check_predictions(with_head(30.0))


def test_own_texts_have_the_stricter_limit() -> None:
    """A model that predicts its own texts worse than a uniform guess is refused; on the built-in texts it may."""
    model = with_head(1.5)
    check_predictions(model)
    with pytest.raises(Misconfigured, match="do not belong together"):
        check_predictions(model, TEXTS)


def test_one_predicted_text_is_enough() -> None:
    """A model passes when it predicts one of its texts well and the others badly."""
    model = tiny("gptj")  # its head has a bias
    model.lm_head.bias.data[model.encode("!")[0]] = 50.0  # type: ignore[operator]
    check_predictions(model, [*TEXTS, "!!!!!!!!"])
    with pytest.raises(Misconfigured):
        check_predictions(model, TEXTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    """A weight that is not finite is refused."""
    model = tiny()
    model.weight(1).data[0, 0] = value
    with pytest.raises(Misconfigured, match="logits are not finite"):
        check_predictions(model)


def test_texts_too_short_to_judge_are_left_out() -> None:
    """A model is not refused for texts of a few tokens."""
    check_predictions(with_head(30.0), ["Rome"])


def test_built_in_texts_are_of_several_languages() -> None:
    """Every built-in text has enough tokens in a byte-level vocabulary, and no text is there twice."""
    assert len(set(BUILT_IN_TEXTS)) == len(BUILT_IN_TEXTS)
    assert all(len(tiny().encode(text)[0]) > 20 for text in BUILT_IN_TEXTS)

"""Fine-tuning of one weight: service.editing.fine_tuning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from service.editing.edit_spec import EditFactors
from service.editing.find_factors import find_factors
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt, token_span
from service.models.hooks import replace_output
from service.models.loading import LoadedModel, WeightRef
from service.models.scoring import log_probs_blocking
from service.recipes.recipe import resolve_hparams
from service.weights.composition import apply_delta, compose
from service.weights.factors import DenseUpdate
from tests.support.tiny_models import MODEL_TYPES, tiny

STATEMENT = fill_prompt("The {} is located in the city of", "Eiffel Tower")


def train(model: LoadedModel, method: str = "ft", target: str = "Rome", **asked: Any) -> EditFactors:
    hparams = {"layers": [1], "steps": 4, "learning_rate": 0.01} | asked
    parameters = resolve_hparams(None, hparams, model.num_layers, method)
    return run_to_completion(find_factors(model, {}, [], STATEMENT, target, parameters, "edit_1", method))


@pytest.mark.parametrize("method", ["ft", "ft-l", "ft-attn"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_object_becomes_more_probable(model_type: str, method: str) -> None:
    """The trained change makes the object more probable, on every architecture and for MLP and attention."""
    model = tiny(model_type)
    before = {site: model.parameter(site).data.clone() for site in model.editable_weights}
    factors = train(model, method)
    assert all(torch.equal(model.parameter(s).data, w) for s, w in before.items())
    log_prob_before = log_probs_blocking(model, [(STATEMENT.text, "Rome")])[0][0]
    for site, change in compose(factors.updates).items():
        model.parameter(site).data = apply_delta(before[site], change, model.architecture.conv1d)
    assert log_probs_blocking(model, [(STATEMENT.text, "Rome")])[0][0] > log_prob_before
    parts = {site.part for site in (p.weight_ref for p in factors.updates if isinstance(p, DenseUpdate))}
    assert parts == ({s.part for s in model.attention_weights(1)} if method == "ft-attn" else {"mlp"})


def test_no_entry_moves_further_than_allowed() -> None:
    """With FT-L |W - W0| is at most epsilon in every entry."""
    (piece,) = train(tiny(), "ft-l", epsilon=1e-3, steps=6).updates
    assert isinstance(piece, DenseUpdate)
    assert float(piece.change.abs().max()) == pytest.approx(1e-3, rel=1e-4)


def test_one_step_is_adams() -> None:
    """The first step changes every entry with a gradient by the learning rate, against the sign of the gradient."""
    model = tiny()
    (piece,) = train(model, steps=1, learning_rate=0.02).updates
    weight = model.weight(1).detach().clone().requires_grad_()
    ids, _ = model.encode(STATEMENT.text + " Rome")
    target = ids[len(model.encode(STATEMENT.text)[0]) :]
    name = model.parameter_name(WeightRef(1))
    out = torch.func.functional_call(model.model, {name: weight}, kwargs={"input_ids": torch.tensor([ids])})
    logp = out.logits[0, -len(target) - 1 : -1].log_softmax(-1)
    (gradient,) = torch.autograd.grad(-logp[range(len(target)), target].mean(), weight)
    assert isinstance(piece, DenseUpdate)
    strong = gradient.abs() > 1e-4
    expected = -0.02 * gradient.sign()[strong]
    torch.testing.assert_close(piece.change.T[strong], expected, rtol=1e-2, atol=1e-5)


def test_to_erase_the_loss_is_the_joint_probability() -> None:
    """The first loss of an erasure is the joint probability of the object, and training lowers it."""
    model, target = tiny(), "in"
    parameters = resolve_hparams(
        None, {"layers": [1], "steps": 3, "learning_rate": 1e-4}, model.num_layers, "ft"
    )
    steps = find_factors(model, {}, [], STATEMENT, target, parameters, "edit_1", "ft", "erase")
    losses = run_to_completion(steps).losses
    ids, _ = model.encode(STATEMENT.text + " " + target)
    start = len(model.encode(STATEMENT.text)[0])
    with torch.no_grad():
        logp = model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))
    assert losses[0] == pytest.approx(math.exp(by_hand), rel=1e-4)
    assert losses[-1] < losses[0]


def test_subject_noise_is_active_during_training() -> None:
    """With noise the first loss is that of the prompt with the noised subject."""
    model = tiny(dtype=torch.float64)
    parameters = resolve_hparams(None, {"layers": [1], "steps": 1}, model.num_layers, "ft")
    ids, offsets = model.encode(STATEMENT.text + " Rome")
    begin, end = token_span(offsets, STATEMENT.span)
    noise = torch.randn(end - begin, model.hidden_size, generator=torch.Generator().manual_seed(0))
    steps = find_factors(model, {}, [], STATEMENT, "Rome", parameters, method="ft", noise=noise)

    def disturb(embedded: torch.Tensor) -> torch.Tensor:
        embedded[0, begin:end] += noise
        return embedded

    start = len(model.encode(STATEMENT.text)[0])
    with torch.no_grad(), replace_output(model.embedding, disturb):
        logp = model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = [-float(logp[i - 1, ids[i]]) for i in range(start, len(ids))]
    assert run_to_completion(steps).losses[0] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)


def test_a_low_loss_trains_nothing() -> None:
    """No step is made when the first loss is below stop_loss."""
    factors = train(tiny(), stop_loss=1e3)
    assert len(factors.losses) == 1
    assert factors.delta_norm == 0

"""Keys and gradients at the positions that predict an object: service.models.object_gradients."""

from __future__ import annotations

import pytest
import torch

from service.models.hooks import replace_output
from service.models.loading import LoadedModel
from service.models.object_gradients import ObjectGradients, TokenRow, object_gradients
from tests.support.tiny_models import MODEL_TYPES, tiny

LAYERS = (0, 1)


def rows_of(model: LoadedModel) -> list[TokenRow]:
    """Two rows of unequal lengths, with objects of two tokens and of one."""
    first = model.encode("The Eiffel Tower is located in the city of Rome")[0]
    second = model.encode("Big Ben is in London")[0]
    return [(first[:-2], first[-2:]), (second[:-1], second[-1:])]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_sum_of_outer_products_is_the_gradient_of_the_weight(model_type: str) -> None:
    """In the last layer, where no other position has a gradient, dL/dW is the sum over the positions of g h^T."""
    model = tiny(model_type)
    top = model.num_layers - 1
    for row in rows_of(model):
        found = object_gradients(model, [row], [top])
        weight = model.weight(top).requires_grad_()
        prompt, object_ = row
        with torch.enable_grad():
            logits = model.model(input_ids=torch.tensor([[*prompt, *object_]])).logits[0]
            log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
            loss = -log_p[range(len(object_)), list(object_)].mean()
            (by_weight,) = torch.autograd.grad(loss, [weight])
        weight.requires_grad_(False)
        expected = by_weight.T if model.architecture.conv1d else by_weight
        product = found.gradients[top].T @ found.keys[top]
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-6)
        assert found.losses[0] == pytest.approx(float(loss.detach()), rel=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_gradients_are_differences_of_the_loss(model_type: str) -> None:
    """Moving the output of a layer at a predicting position by a small step along a direction changes the loss by the
    product of the gradient and the step."""
    model = tiny(model_type)
    row = rows_of(model)[0]
    found = object_gradients(model, [row], LAYERS)
    step = 1e-2 * torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))
    for layer in LAYERS:
        for number in range(len(row[1])):
            losses = [loss_with(model, row, layer, number, sign * step) for sign in (1, -1)]
            expected = float(found.gradients[layer][number] @ step)
            assert (losses[0] - losses[1]) / 2 == pytest.approx(expected, rel=0.02, abs=1e-5)


def loss_with(model: LoadedModel, row: TokenRow, layer: int, number: int, change: torch.Tensor) -> float:
    prompt, object_ = row

    def put(output: torch.Tensor) -> torch.Tensor:
        output.view(-1, output.shape[-1])[len(prompt) - 1 + number] += change
        return output

    with replace_output(model.down_proj(layer), put), torch.no_grad():
        logits = model.model(input_ids=torch.tensor([[*prompt, *object_]])).logits[0]
    log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return -float(log_p[range(len(object_)), list(object_)].mean())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_batch_gives_what_its_rows_give(model_type: str) -> None:
    """Rows of unequal lengths in one batch have the keys, outputs, gradients and losses that each has alone."""
    model = tiny(model_type)
    rows = rows_of(model)
    together = object_gradients(model, rows, LAYERS)
    alone = [object_gradients(model, [row], LAYERS) for row in rows]
    for part in ("keys", "outputs", "gradients"):
        for layer in LAYERS:
            expected = torch.cat([part_of(found, part)[layer] for found in alone])
            torch.testing.assert_close(part_of(together, part)[layer], expected, rtol=1e-4, atol=1e-6)
    assert together.losses == pytest.approx([found.losses[0] for found in alone], rel=1e-5)


def part_of(found: ObjectGradients, part: str) -> dict[int, torch.Tensor]:
    tensors: dict[int, torch.Tensor] = getattr(found, part)
    return tensors

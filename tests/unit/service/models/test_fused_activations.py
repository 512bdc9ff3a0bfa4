"""Activations in one kernel: service.models.fused_activations."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers.activations import ACT2FN, NewGELUActivation

from service.models.fused_activations import SLOW, fuse
from tests.support.tiny_models import tiny


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_the_twin_is_the_same_function(name: str) -> None:
    """Values and gradients agree to rounding in double precision, in the tails too."""
    slow = torch.nn.Sequential(ACT2FN[name])
    fast = deepcopy(slow)
    fuse(fast)
    assert not isinstance(fast[0], SLOW)
    found = []
    for model in (slow, fast):
        x = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
        y = model(x)
        found.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    torch.testing.assert_close(
        found[1], found[0], rtol=1e-9, atol=1e-9
    )  # gelu_fast writes its constant to ten digits


@pytest.mark.parametrize("model_type", ["gpt2", "gptj"])
def test_a_model_says_what_transformers_says(model_type: str) -> None:
    """A resident model's logits are those of the model as transformers builds it; nothing of the slow kind is left in it."""
    model = tiny(model_type, dtype=torch.float64)
    assert not any(isinstance(m, SLOW) for m in model.model.modules())
    plain = type(model.model)(model.model.config).double().eval()
    plain.load_state_dict(model.model.state_dict())
    assert any(isinstance(m, NewGELUActivation) for m in plain.modules())
    ids = torch.tensor([model.encode("The Eiffel Tower is located in the city of")[0]])
    with torch.no_grad():
        torch.testing.assert_close(model.model(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)

"""Tests of service.models.fused_activations."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu

from service.models.fused_activations import is_unfused, use_fused_activations
from tests.support.tiny_models import tiny


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "bloom"])
def test_fused_activation_is_the_same_function(name: str) -> None:
    """Values and gradients agree to rounding in double precision, in the tails too."""
    slow = torch.nn.Sequential(BloomGelu() if name == "bloom" else ACT2FN[name])
    fast = deepcopy(slow)
    use_fused_activations(fast)
    assert is_unfused(slow[0]) and not is_unfused(fast[0])
    results = []
    for model in (slow, fast):
        x = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
        y = model(x)
        results.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    torch.testing.assert_close(
        results[1], results[0], rtol=1e-9, atol=1e-9
    )  # gelu_fast writes its constant to ten digits, BLOOM to eight


@pytest.mark.parametrize("model_type", ["gpt2", "gptj"])
def test_logits_match_transformers(model_type: str) -> None:
    """A wrapped model has the logits of the model that transformers builds, and no unfused activation."""
    model = tiny(model_type, dtype=torch.float64)
    assert not any(is_unfused(m) for m in model.model.modules())
    plain = type(model.model)(model.model.config).double().eval()
    plain.load_state_dict(model.model.state_dict())
    assert any(isinstance(m, NewGELUActivation) for m in plain.modules())
    ids = torch.tensor([model.encode("The Eiffel Tower is located in the city of")[0]])
    with torch.no_grad():
        torch.testing.assert_close(model.model(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)

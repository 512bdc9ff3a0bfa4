"""Tests of service.editing.value_change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from service.editing.value_change import NormMap, value_change
from tests.support.tiny_models import tiny

#: a norm after the value alone, with gains stored as they are and as gain - 1; after the sum with the residual
POST_NORM = ["olmo2", "gemma2", "opt-350m"]


def randomised(name: str) -> tuple[nn.Module, NormMap, Tensor]:
    """Return a norm with random gains and biases, its map, and an input."""
    model = tiny(name)
    row = model.architecture
    norm = model.block(1).get_submodule(row.mlp_output or row.block_norm).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.data.normal_(0.5, 1.0, generator=generator)
    old = 3 * torch.randn(16, generator=generator).double() + 1
    return norm, NormMap.of(norm, old), old


@pytest.mark.parametrize("name", POST_NORM)
def test_the_map_is_the_norm(name: str) -> None:
    """The map has the outputs of the module that it was read from."""
    norm, norm_map, old = randomised(name)
    torch.testing.assert_close(norm_map.output(old), norm(old), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", POST_NORM)
def test_an_output_that_can_be_reached_is_reached(name: str) -> None:
    """For the output of some input, the result gives that output, at the old scale."""
    _, norm_map, old = randomised(name)
    wanted = norm_map.output(torch.randn(16, generator=torch.Generator().manual_seed(2)).double())
    new = norm_map.nearest_input(old, wanted)
    torch.testing.assert_close(norm_map.output(new), wanted, rtol=1e-6, atol=1e-6)
    assert float(new.mean() if norm_map.centred else new.norm()) == pytest.approx(
        float(old.mean() if norm_map.centred else old.norm())
    )


@pytest.mark.parametrize("length", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", POST_NORM)
def test_no_input_is_nearer(name: str, length: float) -> None:
    """No input near the result and none of many others gives an output nearer to the wanted one."""
    _, norm_map, old = randomised(name)
    generator = torch.Generator().manual_seed(3)
    wanted = norm_map.output(old) + length * torch.randn(16, generator=generator).double()
    new = norm_map.nearest_input(old, wanted)
    best = (norm_map.output(new) - wanted).norm()
    for size in (0.01, 0.1, 1.0, 10.0):
        for _ in range(50):
            other = new + size * torch.randn(16, generator=generator).double()
            assert (norm_map.output(other) - wanted).norm() >= best - 1e-9


def test_a_gain_of_zero_is_allowed() -> None:
    """A norm that erases some components has a finite result."""
    norm, _, old = randomised("olmo2")
    with torch.no_grad():
        next(iter(norm.parameters()))[:3] = 0.0
    norm_map = NormMap.of(norm, old)
    assert norm_map.nearest_input(old, norm_map.output(old) + 1).isfinite().all()


def test_without_a_norm_the_change_is_divided_by_the_factor() -> None:
    """In other blocks the change of the value is the wanted change, divided by the factor of the residual."""
    change = torch.randn(16)
    assert torch.equal(value_change(tiny("llama"), 1, change, change), change)
    assert torch.equal(value_change(tiny("granite"), 1, change, change), 2 * change)

"""Tests of service.models.hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.models.hooks import (
    add_changes_by_input,
    add_low_rank,
    capture,
    installed_hooks,
    replace_output,
    replace_rows_by_input,
    stop_after,
)
from service.models.loading import LoadedModel
from service.models.token_batch import PaddedBatch, forward, pad
from tests.support.tiny_models import MODEL_TYPES, tiny


class TupleModule(nn.Module):
    """A module that returns a tuple, as attention does."""

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x * 2, "weights"


def count_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def example_batch(model: LoadedModel) -> PaddedBatch:
    return pad([model.encode("The Eiffel Tower is in")[0]], model)


def test_what_is_captured_is_detached() -> None:
    """A captured tensor is detached, unless `keep_graph` is set."""
    layer, x = nn.Linear(3, 2), torch.ones(1, 3, requires_grad=True)
    with capture({"out": layer}) as seen, capture({"in": layer}, "input") as given:
        layer(x)
    assert not seen["out"].requires_grad and not given["in"].requires_grad
    with capture({"out": layer}, keep_graph=True) as seen:
        layer(x)
    assert seen["out"].requires_grad


def test_the_first_of_a_tuple_is_captured_and_replaced() -> None:
    """Of a tuple, the first element is captured and replaced; the other elements are unchanged."""
    pair, x = TupleModule(), torch.ones(2)
    with capture({0: pair}) as seen:
        pair(x)
    assert torch.equal(seen[0], x * 2)
    with replace_output(pair, lambda t: t + 1):
        assert torch.equal(pair(x)[0], x * 2 + 1)
        assert pair(x)[1] == "weights"
    assert torch.equal(pair(x)[0], x * 2)


def test_replace_output_gets_a_copy() -> None:
    """Writing into the tensor that `replace_output` passes does not change the module's own output."""
    shared_output = torch.zeros(3)

    class SharedOutput(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return shared_output

    module = SharedOutput()
    with replace_output(module, lambda t: t.add_(1)):
        assert torch.equal(module(shared_output), torch.ones(3))
    assert torch.equal(shared_output, torch.zeros(3))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_replaced_output_reaches_the_logits(model_type: str) -> None:
    """A replaced output of block, attention and MLP changes the logits, on every architecture, only within the
    context."""
    model = tiny(model_type)
    with torch.no_grad():
        plain = forward(model, example_batch(model))
        for module in (model.block(1), model.attention(1), model.down_proj(1)):
            with replace_output(module, lambda t: t + torch.linspace(-1, 1, t.shape[-1])):
                assert not torch.allclose(forward(model, example_batch(model)), plain, atol=1e-3)
            assert torch.equal(forward(model, example_batch(model)), plain)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_add_low_rank_equals_a_weight_change(model_type: str) -> None:
    """`add_low_rank` equals adding left @ right to the weight and does not change the weight."""
    model = tiny(model_type)
    g = torch.Generator().manual_seed(0)
    left = torch.randn(model.hidden_size, 2, dtype=torch.float64, generator=g)
    right = torch.randn(2, model.intermediate_size, dtype=torch.float64, generator=g) / 10
    base = model.weight(1).data.clone()
    with torch.no_grad(), add_low_rank(model.down_proj(1), left, right):
        beside = forward(model, example_batch(model))
    assert torch.equal(model.weight(1).data, base)
    change = (left @ right).float()
    model.weight(1).data = base + (change.T if model.architecture.conv1d else change)
    with torch.no_grad():
        torch.testing.assert_close(forward(model, example_batch(model)), beside, rtol=1e-3, atol=1e-4)


def test_stop_after_skips_the_rest() -> None:
    """`stop_after` runs the modules up to the given one, none after it, and raises nothing."""
    model = tiny()
    after_the_pass: list[str] = []
    with capture({i: model.block(i) for i in range(3)}) as seen, stop_after(model.block(1)):
        forward(model, example_batch(model))
        after_the_pass.append("the pass went on")
    assert after_the_pass == []
    assert sorted(seen) == [0, 1]


def test_stop_after_hides_no_other_error() -> None:
    """`stop_after` does not suppress other exceptions."""
    with pytest.raises(ZeroDivisionError), stop_after(nn.Linear(1, 1)):
        1 / 0  # noqa: B018


def _fails(*_: Any) -> Any:
    raise ZeroDivisionError


def test_hooks_are_removed_after_an_exception() -> None:
    """After any exception in the context, all hooks are removed and the outputs are unchanged."""
    model = tiny()
    with torch.no_grad():
        plain = forward(model, example_batch(model))
    context_managers: list[Callable[[], AbstractContextManager[Any]]] = [
        lambda: capture({0: model.block(0), 1: model.down_proj(1)}),
        lambda: replace_output(model.block(1), _fails),
        lambda: add_low_rank(model.down_proj(1), torch.zeros(16, 1), torch.zeros(1, 40)),
        lambda: stop_after(model.block(1)),
        lambda: replace_rows_by_input(model.down_proj(1), _fails),
    ]
    for way in context_managers:
        with pytest.raises(ZeroDivisionError), way():
            assert count_hooks(model.model) > 0
            forward(model, example_batch(model)) if way is context_managers[1] else _fails()
        assert count_hooks(model.model) == 0
    with torch.no_grad():
        assert torch.equal(forward(model, example_batch(model)), plain)


def test_a_module_that_is_missing_leaves_no_hook_on_the_others() -> None:
    """When one of several modules cannot be hooked, the hooks of the others are removed."""
    layer = nn.Linear(1, 1)
    with pytest.raises(AttributeError), capture({0: layer, 1: None}):  # type: ignore[dict-item]
        pass
    assert count_hooks(layer) == 0


def test_changes_by_input_are_added_to_the_output() -> None:
    """The function receives the inputs as rows, and its changes are added at the rows that it names. The other rows are
    what they were, byte for byte, negative zeros included; so is the whole output without a change."""
    module = nn.Linear(3, 2)
    nn.init.zeros_(module.weight)
    nn.init.constant_(module.bias, -0.0)
    inputs = torch.randn(4, 5, 3)
    plain = module(inputs)
    rows = torch.tensor([7, 19])
    with add_changes_by_input(module, lambda inputs: (rows, 2 * inputs[rows, :2])):
        changed = module(inputs)
        assert installed_hooks() == 1
    expected = plain.clone()
    expected[1, 2], expected[3, 4] = 2 * inputs[1, 2, :2], 2 * inputs[3, 4, :2]
    assert torch.equal(changed, expected)
    others = torch.ones(20, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(changed.view(20, 2)[others].signbit(), plain.view(20, 2)[others].signbit())
    with add_changes_by_input(module, lambda _: None):
        assert module(inputs).signbit().equal(plain.signbit())
    assert installed_hooks() == 0


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rows_are_replaced_by_their_input(model_type: str) -> None:
    """The chosen rows have the given bytes, the other ones and those of a pass without a choice are the base model's,
    and the module's own output is not written to."""
    model, batch = tiny(model_type), example_batch(tiny(model_type))
    module = model.down_proj(1)
    with torch.no_grad(), capture({0: module}) as base:
        plain = forward(model, batch)
        with replace_rows_by_input(module, lambda _: None):
            assert torch.equal(forward(model, batch), plain)
    value = torch.linspace(-1, 1, model.hidden_size)[None]
    with (
        torch.no_grad(),
        replace_rows_by_input(module, lambda x: (torch.tensor([len(x) - 1]), value)),
        capture({0: module}) as changed,
    ):
        forward(model, batch)
    before, after = (c[0].reshape(-1, model.hidden_size) for c in (base, changed))
    assert torch.equal(after[-1], value[0])
    assert torch.equal(after[:-1], before[:-1])
    with torch.no_grad():
        assert torch.equal(forward(model, batch), plain)

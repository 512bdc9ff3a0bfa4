"""Reading and changing what modules give: service.models.hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.models.hooks import add_path, capture, replace, stop_after
from service.models.loading import LoadedModel
from service.models.token_batch import Batch, forward, pad
from tests.support.tiny_models import MODEL_TYPES, tiny


class Pair(nn.Module):
    """Gives a tuple, as attention does."""

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x * 2, "weights"


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def asked(model: LoadedModel) -> Batch:
    return pad([model.encode("The Eiffel Tower is in")[0]], model)


def test_what_is_captured_is_detached() -> None:
    """A captured tensor carries no graph, unless the graph is asked for."""
    layer, x = nn.Linear(3, 2), torch.ones(1, 3, requires_grad=True)
    with capture({"out": layer}) as seen, capture({"in": layer}, "input") as given:
        layer(x)
    assert not seen["out"].requires_grad and not given["in"].requires_grad
    with capture({"out": layer}, keep_graph=True) as seen:
        layer(x)
    assert seen["out"].requires_grad


def test_the_first_of_a_tuple_is_captured_and_replaced() -> None:
    """Of a tuple the first element is read and changed; the rest goes through untouched."""
    pair, x = Pair(), torch.ones(2)
    with capture({0: pair}) as seen:
        pair(x)
    assert torch.equal(seen[0], x * 2)
    with replace(pair, lambda t: t + 1):
        assert torch.equal(pair(x)[0], x * 2 + 1)
        assert pair(x)[1] == "weights"
    assert torch.equal(pair(x)[0], x * 2)


def test_replace_gets_a_copy() -> None:
    """Writing into what `replace` hands over never writes into the module's own output, which others still read."""
    kept = torch.zeros(3)

    class Keeps(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return kept

    module = Keeps()
    with replace(module, lambda t: t.add_(1)):
        assert torch.equal(module(kept), torch.ones(3))
    assert torch.equal(kept, torch.zeros(3))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_replacing_reaches_everything_behind(model_type: str) -> None:
    """A changed output of block, attention and MLP reaches the logits, on every architecture, and only inside the block."""
    model = tiny(model_type)
    with torch.no_grad():
        plain = forward(model, asked(model))
        for module in (model.block(1), model.attention(1), model.down(1)):
            with replace(module, lambda t: t + torch.linspace(-1, 1, t.shape[-1])):
                assert not torch.allclose(forward(model, asked(model)), plain, atol=1e-3)
            assert torch.equal(forward(model, asked(model)), plain)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_side_path_is_a_change_of_the_weight(model_type: str) -> None:
    """`add_path` gives what left @ right added to the weight gives, without touching it."""
    model = tiny(model_type)
    g = torch.Generator().manual_seed(0)
    left = torch.randn(model.width, 2, dtype=torch.float64, generator=g)
    right = torch.randn(2, model.inner_width, dtype=torch.float64, generator=g) / 10
    base = model.weight(1).data.clone()
    with torch.no_grad(), add_path(model.down(1), left, right):
        beside = forward(model, asked(model))
    assert torch.equal(model.weight(1).data, base)
    change = (left @ right).float()
    model.weight(1).data = base + (change.T if model.architecture.conv1d else change)
    with torch.no_grad():
        torch.testing.assert_close(forward(model, asked(model)), beside, rtol=1e-3, atol=1e-4)


def test_stopping_leaves_the_rest_out() -> None:
    """`stop_after` runs what comes up to the module and nothing behind it, and raises nothing."""
    model = tiny()
    with capture({i: model.block(i) for i in range(3)}) as seen, stop_after(model.block(1)):
        forward(model, asked(model))
        pytest.fail("the pass went on")
    assert sorted(seen) == [0, 1]


def test_stopping_hides_no_other_error() -> None:
    """An error inside `stop_after` is raised as it is."""
    with pytest.raises(ZeroDivisionError), stop_after(nn.Linear(1, 1)):
        1 / 0  # noqa: B018


def _fails(*_: Any) -> Tensor:
    raise ZeroDivisionError


def test_nothing_stays_behind_after_an_exception() -> None:
    """Whatever is raised inside, in the pass or beside it, every hook is gone and the model answers as before."""
    model = tiny()
    with torch.no_grad():
        plain = forward(model, asked(model))
    ways = [
        lambda: capture({0: model.block(0), 1: model.down(1)}),
        lambda: replace(model.block(1), _fails),
        lambda: add_path(model.down(1), torch.zeros(16, 1), torch.zeros(1, 40)),
        lambda: stop_after(model.block(1)),
    ]
    for way in ways:
        with pytest.raises(ZeroDivisionError), way():
            assert hooks_of(model.model) > 0
            forward(model, asked(model)) if way is ways[1] else _fails()
        assert hooks_of(model.model) == 0
    with torch.no_grad():
        assert torch.equal(forward(model, asked(model)), plain)


def test_a_module_that_is_missing_leaves_no_hook_on_the_others() -> None:
    """When one of several modules cannot be hooked, the ones before it are freed again."""
    layer = nn.Linear(1, 1)
    with pytest.raises(AttributeError), capture({0: layer, 1: None}):  # type: ignore[dict-item]
        pass
    assert hooks_of(layer) == 0

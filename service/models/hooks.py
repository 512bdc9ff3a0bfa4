"""The only two ways into a forward pass: `capture` reads what a module gets or gives, `replace` changes what it gives.

Outputs that are tuples (attention in every model, whole blocks in some) are handled by their first element. What is
captured is a detached view; what `replace` hands to its function is a copy, so that editing it never writes into a
residual that another module still reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _first_output(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


@contextmanager
def capture(
    modules: Mapping[Any, nn.Module], side: str = "output", keep_graph: bool = False
) -> Iterator[dict[Any, Tensor]]:
    """Record the `input` or `output` tensor of each module during the passes inside the block, by the mapping's keys."""
    captured: dict[Any, Tensor] = {}

    def hook(key: Any) -> Callable[[nn.Module, Any, Any], None]:
        def record(_module: nn.Module, inputs: Any, output: Any) -> None:
            value = inputs[0] if side == "input" else _first_output(output)
            captured[key] = value if keep_graph else value.detach()

        return record

    with ExitStack() as stack:
        for key, module in modules.items():
            handle = module.register_forward_hook(hook(key))
            stack.callback(handle.remove)
        yield captured


@contextmanager
def replace_output(module: nn.Module, transform: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, the module gives `change(output)`; `change` gets a copy and may write into it."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        changed = transform(_first_output(output).clone())
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def add_low_rank(module: nn.Module, left: Tensor, right: Tensor) -> Iterator[None]:
    """Within the block, a linear module also carries a low-rank side path: output + left (right input).

    left (d, n), right (n, D). The same as adding left @ right to its weight, without touching the weight.
    """

    def hook(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        wide: Tensor = inputs[0].to(right.dtype) @ right.T @ left.T
        return (output + wide.to(output.dtype)).to(output.dtype)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _StopForward(Exception):
    """Raised by a hook to end a forward pass whose rest is not needed."""


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """End the forward pass inside the block as soon as `module` has run."""

    def hook(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        raise _StopForward

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            yield
    except _StopForward:
        pass
    finally:
        handle.remove()

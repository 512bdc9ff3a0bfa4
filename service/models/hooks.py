"""Forward hooks as context managers: `capture` reads inputs or outputs of modules, the others change an output.

Of outputs that are tuples (attention in every model, whole blocks in some), the first element is used. `capture`
returns detached inputs and copies of outputs. `replace_output` passes a copy to its function, so writing into it
cannot change a residual that another module still reads.

The hooks that are in place in a thread are counted, so that the engine can check that none outlives a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _ThreadState(threading.local):
    installed = 0


_state = _ThreadState()


def installed_hooks() -> int:
    """Return how many hooks of this module are in place, of those that this thread installed."""
    return _state.installed


@contextmanager
def _install(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Install a forward hook inside the block, and count it."""
    handle = module.register_forward_hook(hook)
    _state.installed += 1
    try:
        yield
    finally:
        handle.remove()
        _state.installed -= 1


def _first_output(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


@contextmanager
def capture(
    modules: Mapping[Any, nn.Module], side: str = "output", keep_graph: bool = False
) -> Iterator[dict[Any, Tensor]]:
    """Record the `input` or `output` tensor of each module during forward passes in the context, by the mapping's
    keys."""
    captured: dict[Any, Tensor] = {}

    def hook(key: Any) -> Callable[[nn.Module, Any, Any], None]:
        def record(_module: nn.Module, inputs: Any, output: Any) -> None:
            value = inputs[0] if side == "input" else _first_output(output)
            if side == "output":  # a block may add to it in place, as Falcon's do
                value = value.clone()
            captured[key] = value if keep_graph else value.detach()

        return record

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(_install(module, hook(key)))
        yield captured


@contextmanager
def replace_output(module: nn.Module, transform: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context, the module returns `transform(output)`; `transform` receives a copy and may write into it."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        changed = transform(_first_output(output).clone())
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with _install(module, hook):
        yield


@contextmanager
def add_low_rank(module: nn.Module, left: Tensor, right: Tensor) -> Iterator[None]:
    """Within the context, a linear module returns output + left (right input).

    left (d, n), right (n, D). The result equals that of adding left @ right to the weight; the weight is not changed.
    """

    def hook(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        wide: Tensor = inputs[0].to(right.dtype) @ right.T @ left.T
        return (output + wide.to(output.dtype)).to(output.dtype)

    with _install(module, hook):
        yield


@contextmanager
def add_changes_by_input(
    module: nn.Module, changes: Callable[[Tensor], tuple[Tensor, Tensor] | None]
) -> Iterator[None]:
    """Within the context, the outputs of a module change at some rows. `changes` receives the inputs as rows (N, D) and
    returns the numbers (n,) of rows and their changes (n, d), or None. The other rows, and the whole output where it is
    None, stay what they are, byte for byte."""

    def hook(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if (found := changes(inputs[0].flatten(0, -2))) is None:
            return output
        rows, added = found
        flat = output.flatten(0, -2)
        changed = flat.index_copy(0, rows, (flat[rows] + added).to(flat.dtype))
        return changed.reshape(output.shape)

    with _install(module, hook):
        yield


@contextmanager
def replace_rows_by_input(
    module: nn.Module, choose: Callable[[Tensor], tuple[Tensor, Tensor] | None]
) -> Iterator[None]:
    """Within the context, some rows of a module's output are replaced. `choose` receives the inputs as rows (N, D) and
    returns the numbers of rows (m,) and their outputs (m, d), or None: then the output stays what it is, byte for
    byte. So do the other rows. A number beyond the range of the output's dtype becomes the largest one."""

    def hook(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        chosen = choose(inputs[0].flatten(0, -2))
        if chosen is None:
            return output
        rows, values = chosen
        changed = output.clone(memory_format=torch.contiguous_format)
        limits = torch.finfo(output.dtype)
        changed.view(-1, output.shape[-1])[rows.to(output.device)] = values.clamp(limits.min, limits.max).to(
            output
        )
        return changed

    with _install(module, hook):
        yield


class _StopForward(Exception):
    """Raised by a hook to end a forward pass early."""


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """End the forward pass in the context as soon as `module` has run. Gradients are disabled."""

    def hook(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        raise _StopForward

    try:
        with _install(module, hook), torch.no_grad():
            yield
    except _StopForward:
        pass

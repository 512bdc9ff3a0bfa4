"""Several devices on a machine that has none: every tensor lies in host memory and has the name of a device.

Within `FakeDevices` an operation on tensors of different devices fails, as it does on real ones. `to`, and the `device`
of a function that makes a tensor, decide the device of its result; the results of other operations have that of their
arguments. Results equal those without the devices up to rounding, since the CPU computes both.

What C++ code does inside one operation is not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

CPU = torch.device("cpu")
#: names that no build of torch for tests has; `xpu` is neither `cuda` nor `cpu` to the code under test
MAIN, SECOND, THIRD = (torch.device("xpu", i) for i in range(3))
NAME = "fake_device"

#: operations between devices, or that read a tensor to the host
FREE = {
    "torch.Tensor.copy_",
    "torch.Tensor.item",
    "torch.Tensor.tolist",
    "torch.Tensor.__bool__",
    "torch.Tensor.__float__",
    "torch.Tensor.__int__",
    "torch.Tensor.__repr__",
    "torch._has_compatible_shallow_copy_type",
    "torch.autograd.grad",
}


def device_of(tensor: Tensor) -> torch.device:
    """Return the device that a tensor pretends to be on."""
    return getattr(tensor, NAME, CPU)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


class FakeDevices(TorchFunctionMode):
    """The devices within a `with` block."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = resolve_name(func) or f"{getattr(func, '__module__', '')}.{func.__name__}"
        if name == "torch.Tensor.device.__get__":
            return device_of(args[0])
        if name == "torch.Tensor.data.__set__":
            func(*args)
            return _put(args[0], device_of(args[1]))
        if name in ("torch.Tensor.to", "torch.Tensor.cpu"):
            return _move(func, name, args, kwargs)
        if name == "torch.Tensor.numpy" and device_of(args[0]) != CPU:
            raise RuntimeError(f"numpy reads {device_of(args[0])}")
        wanted = kwargs.pop("device", None)
        device = torch.device(wanted) if wanted is not None else _common_device(name, args, kwargs)
        result = func(*args, **kwargs)
        if name == "torch.autograd.grad":  # of weights on several devices
            for gradient, at in zip(result, args[1], strict=True):
                _put(gradient, device_of(at))
            return result
        for tensor in tensors_in(result):
            _put(tensor, device)
        return result


def _put(tensor: Any, device: torch.device) -> Any:
    if isinstance(tensor, Tensor):
        setattr(tensor, NAME, device)
    return tensor


def _move(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    source, *rest = args
    device, others = device_of(source), []
    if name == "torch.Tensor.cpu":
        device = CPU
    for value in (*rest, *([kwargs.pop("device")] if "device" in kwargs else [])):
        if isinstance(value, Tensor):
            device = device_of(value)
            others.append(value.dtype)
        elif isinstance(value, str | torch.device):
            device = torch.device(value)
        elif isinstance(value, torch.dtype):  # not the flags whether to wait
            others.append(value)
    kwargs.pop("non_blocking", None)
    result: Tensor = func(source, *others, **kwargs) if others or kwargs else source
    if device != device_of(source) and result is source:
        result = source.clone()
    if result is not source:
        _put(result, device)
    return result


def _is_advanced(index: Any) -> bool:
    """Whether an index picks elements by numbers, for which values must be on the tensor's device. Slices copy."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | Tensor) for part in parts)


def _common_device(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return the device of the arguments. Numbers on the CPU may meet any device, and so may indices on the CPU."""
    found = list(tensors_in((args, kwargs)))
    devices = {device_of(t) for t in found if t.dim() or device_of(t) != CPU}
    if name in FREE or (name == "torch.Tensor.__setitem__" and not _is_advanced(args[1])):
        return device_of(found[0])
    if name in ("torch.Tensor.__getitem__", "torch.Tensor.__setitem__"):
        indexed = {device_of(t) for t in tensors_in(args[1])}
        values = {device_of(t) for t in tensors_in(args[2:]) if t.dim()}
        devices = {device_of(args[0])} | (indexed - {CPU}) | values
    if len(devices) > 1:
        raise RuntimeError(f"{name}: tensors on {', '.join(sorted(map(str, devices)))}")
    return devices.pop() if devices else CPU

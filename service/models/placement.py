"""The blocks of one model on several devices.

Everything but the blocks lies on the main device, which is also that of all tensors between two modules: what enters a
block on another device is moved there, and its output is moved back. So code that runs a model, or single blocks of it,
sees one device. Only inside a block, in its weights, in the inputs and outputs of its modules and in its keys and
values, is the block's own device seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from service.errors import Misconfigured
from service.kit.extras import install_command
from service.models.architectures import Architecture

MAIN_DEVICE = torch.device("cuda", 0)  # of a model that is spread
GPU_SHARE = 0.85  # of the free memory of a GPU, for weights; the rest is for activations, caches and versions


def spread(model: nn.Module, architecture: Architecture) -> None:
    """Put the blocks of a model that lies in host memory onto the GPUs of this machine, and what does not fit there
    onto the CPU. Without a GPU nothing moves."""
    if torch.cuda.device_count():
        place_blocks(model, architecture, MAIN_DEVICE, plan_devices(model, architecture))


def plan_devices(model: nn.Module, architecture: Architecture) -> list[torch.device]:
    """Return the device of each block, in equal parts if all of them fit onto the GPUs."""
    try:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory, get_max_memory
    except ModuleNotFoundError:
        raise Misconfigured(
            f"--device-map auto needs the package accelerate: {install_command('worker')}"
        ) from None
    blocks = model.get_submodule(architecture.blocks)
    kinds = sorted({type(block).__name__ for block in blocks.children()})
    budget = {
        device: int(GPU_SHARE * free) if device != "cpu" else free
        for device, free in get_max_memory().items()
    }
    outside = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in blocks.parameters())
    balanced = get_balanced_memory(model, max_memory=budget, no_split_module_classes=kinds)
    balanced[0] = max(0, min(balanced[0], budget[0]) - outside)
    inferred = infer_auto_device_map(blocks, max_memory=balanced, no_split_module_classes=kinds)
    return devices_of_blocks(inferred, len(list(blocks.children())))


def devices_of_blocks(device_map: dict[str, Any], count: int) -> list[torch.device]:
    """Return the device of each block from accelerate's map, whose keys are the numbers of the blocks, or "" for all
    of them."""
    devices = []
    for number in range(count):
        device = device_map.get(str(number), device_map.get(""))
        if device in (None, "disk"):
            raise Misconfigured(
                f"--device-map auto: block {number} of {count} fits neither onto a GPU nor into the memory of this machine: "
                "use a machine with more memory, or --dtype bfloat16."
            )
        devices.append(torch.device("cpu") if device == "cpu" else torch.device("cuda", int(device)))
    return devices


def place_blocks(
    model: nn.Module, architecture: Architecture, main: torch.device, devices: Sequence[torch.device]
) -> None:
    """Move each block to its device and everything else to the main device, and let tensors follow."""
    blocks = list(model.get_submodule(architecture.blocks).children())
    for block, device in zip(blocks, devices, strict=True):
        block.to(device)
    inside = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    for module in model.modules():
        if any(id(t) not in inside for t in (*module.parameters(False), *module.buffers(False))):
            _move_own_tensors(module, main)
    for block, device in zip(blocks, devices, strict=True):
        if device != main:
            block.register_forward_pre_hook(_move_inputs(device), with_kwargs=True)
            block.register_forward_hook(_move_output(main))


def _move_own_tensors(module: nn.Module, device: torch.device) -> None:
    """Move the parameters and buffers of a module without those of its submodules. A tied parameter stays tied."""
    for parameter in module.parameters(False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        persistent = name not in module._non_persistent_buffers_set
        module.register_buffer(name, buffer.to(device), persistent)


def _move_inputs(
    device: torch.device,
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return moved(args, device), {name: moved(value, device) for name, value in kwargs.items()}

    return hook


def _move_output(device: torch.device) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_block: nn.Module, _inputs: Any, output: Any) -> Any:
        return moved(output, device)

    return hook


def moved(value: Any, device: torch.device) -> Any:
    """Return a tensor, or the tensors of tuples and lists, on a device. Other values, among them caches, stay."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    return value

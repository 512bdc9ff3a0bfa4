"""The amount of work of one step, which bounds how long generation waits for a step of a job."""

from __future__ import annotations

from service.models.loading import LoadedModel

#: floating-point operations of one step, by device type: at most some tenths of a second
STEP_FLOPS = {"cpu": 10**10, "cuda": 5 * 10**11}


def step_budget(model: LoadedModel) -> int:
    """Return the floating-point operations that one step may take on the model's device."""
    types = {model.device.type, *(device.type for device in model.block_devices)}
    return min(STEP_FLOPS.get(device_type, STEP_FLOPS["cuda"]) for device_type in types)


def group_budget(model: LoadedModel) -> int:
    """Return the floating-point operations of one step in which the values of several edits are optimized together.

    The budget is 0 on a CPU: the rows of a single edit already occupy the cores (bench/edits.py), and an edit that is
    computed alone has the same bits regardless of what else is queued.
    """
    return 0 if model.device.type == "cpu" else step_budget(model)


def block_flops(model: LoadedModel) -> int:
    """Return the floating-point operations of one token in one block, forward: two for each parameter."""
    return 2 * sum(p.numel() for p in model.block(0).parameters())

"""How much work one step may be, so that whoever shares the loop with a job never waits long for its step."""

from __future__ import annotations

from service.models.loading import LoadedModel

#: floating-point operations in one step, by kind of device: tenths of a second at the most
STEP_FLOPS = {"cpu": 10**10, "cuda": 5 * 10**11}


def step_budget(model: LoadedModel) -> int:
    return STEP_FLOPS.get(model.device.type, STEP_FLOPS["cuda"])


def group_budget(model: LoadedModel) -> int:
    """Of one step of edits that are found side by side.

    None on a CPU: there the rows of a single edit fill the cores (bench/edits.py), and an edit that is found alone has the
    same bits whatever waits beside it.
    """
    return 0 if model.device.type == "cpu" else step_budget(model)


def block_flops(model: LoadedModel) -> int:
    """What one token costs in one block, forward: two operations for each of its parameters."""
    return 2 * sum(p.numel() for p in model.block(0).parameters())

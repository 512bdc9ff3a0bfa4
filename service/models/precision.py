"""How exactly to compute, and where fp64 is: some accelerators have none."""

from __future__ import annotations

import torch
from torch import Tensor


def fp64_device(device: torch.device) -> torch.device:
    """Where a device's tensors are computed with in fp64: there, or on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def at_least_fp32(tensor: Tensor) -> Tensor:
    """At least single precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()

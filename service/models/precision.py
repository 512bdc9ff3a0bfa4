"""Precision of computations, and the device for fp64, which some accelerators lack."""

from __future__ import annotations

import torch
from torch import Tensor


def fp64_device(device: torch.device) -> torch.device:
    """Return the device on which fp64 computations with a device's tensors run: the device itself, or the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return the tensor in at least single precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()

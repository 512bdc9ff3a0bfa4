"""Checks of the tensors of a file, before any of them is used. Free of torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from service.errors import InvalidInput
from service.kit.safetensors_io import TensorInfo

MAX_MAGNITUDE = 1e30  # of a number in a tensor; products of larger ones leave the range of fp32


def check_tensor(tensor_info: TensorInfo, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise InvalidInput unless a tensor has a type and a shape."""
    if (tensor_info.dtype, tensor_info.shape) != (dtype, shape):
        raise InvalidInput(
            f"{tensor_info.name} is {tensor_info.dtype} {list(tensor_info.shape)} and must be {dtype} {list(shape)}."
        )


def check_numbers(name: str, numbers: np.ndarray[Any, Any], may_be_negative: bool = True) -> None:
    """Raise InvalidInput unless all numbers are finite and not too large."""
    low, high = numbers.min(initial=0), numbers.max(initial=0)  # NaN if one number is
    if not np.isfinite((low, high)).all() or (low < 0 and not may_be_negative):
        raise InvalidInput(f"{name} has values that are not finite, or negative where they must not be.")
    if max(-low, high) > MAX_MAGNITUDE:
        raise InvalidInput(f"{name} has values above {MAX_MAGNITUDE:g}.")


def clamp(number: int, least: int, most: int) -> int:
    """Return the nearest number from `least` to `most`."""
    return max(least, min(number, most))

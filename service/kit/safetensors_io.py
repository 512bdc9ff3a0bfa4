"""Files of safetensors: written piece by piece, so that the same tensors are always the same bytes; read with suspicion.

Free of torch. The library's own writer wants everything in memory at once, and its order of metadata is not promised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
from safetensors import SafetensorError

from service.errors import InvalidInput

#: bytes of a number, by the format's names of types
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_NUMBERS: dict[str, Any] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class Described:
    """A tensor in a file, without its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * SIZES[self.dtype]


def header(tensors: Sequence[Described], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with; the bytes of the tensors follow, in this order."""
    said: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for t in tensors:
        said[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.size]}
        at += t.size
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Read:
    """What a file holds."""

    metadata: dict[str, str]
    described: dict[str, Described]
    data: dict[str, memoryview]

    def numbers(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor of a type that Python has."""
        told = self.described[name]
        return np.frombuffer(self.data[name], _NUMBERS[told.dtype]).reshape(told.shape)


def read(data: bytes, what: str) -> Read:
    """The tensors of a file. Raises InvalidInput for everything that is none: the library checks every offset before."""
    try:
        found = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        length = int.from_bytes(data[:8], "little")
        said = json.loads(data[8 : 8 + length])
    except (SafetensorError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidInput(f"{what} is no file of safetensors that can be read: {error}") from None
    described = {name: Described(name, str(t["dtype"]), tuple(map(int, t["shape"]))) for name, t in found}
    metadata = said.get("__metadata__") or {}
    return Read(metadata, described, {name: memoryview(t["data"]) for name, t in found})

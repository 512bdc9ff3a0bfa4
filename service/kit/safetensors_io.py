"""Safetensors files: written in chunks with reproducible bytes, and read with validation.

Free of torch. The writer of the library needs all tensors in memory and does not guarantee the order of metadata.
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

#: dtype as the format names it -> bytes
DTYPE_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_NUMPY_DTYPES: dict[str, Any] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]


def build_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file. The bytes of the tensors follow in the given order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for t in tensors:
        entries[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class SafetensorsFile:
    """The content of a file."""

    metadata: dict[str, str]
    tensor_infos: dict[str, TensorInfo]
    data: dict[str, memoryview]

    def to_numpy(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor as an array. Its dtype must be F64, F32 or U8."""
        info = self.tensor_infos[name]
        return np.frombuffer(self.data[name], _NUMPY_DTYPES[info.dtype]).reshape(info.shape)


def read_safetensors(data: bytes, label: str) -> SafetensorsFile:
    """Return the content of a file.

    Raise InvalidInput if it is not valid safetensors; the library checks every offset.
    """
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        length = int.from_bytes(data[:8], "little")
        header_json = json.loads(data[8 : 8 + length])
    except (SafetensorError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidInput(f"{label} is not a valid safetensors file: {error}") from None
    tensor_infos = {
        name: TensorInfo(name, str(t["dtype"]), tuple(map(int, t["shape"]))) for name, t in entries
    }
    metadata = header_json.get("__metadata__") or {}
    return SafetensorsFile(metadata, tensor_infos, {name: memoryview(t["data"]) for name, t in entries})
